"""The HTTP application: routes, middleware, error responses and the OpenAPI document."""
