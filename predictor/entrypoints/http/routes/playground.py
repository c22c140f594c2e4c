"""The page to talk to the model: static files of this package, which send requests as any other client does."""

from pathlib import Path

from fastapi import APIRouter, Request, Response

from predictor.errors import NotFound

DIRECTORY = Path(__file__).parents[1] / "playground"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PAGE = "index.html"
HEADERS = {
    # Nothing from elsewhere, and no inline code: what a model writes cannot become a script.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Vary": "Accept",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


_FILES = {file.name: file.read_bytes() for file in sorted(DIRECTORY.iterdir())}


def create_router() -> APIRouter:
    """Build the route of the page's files."""
    router = APIRouter(tags=["playground"])

    @router.get("/playground/{name}", include_in_schema=False)
    async def playground_file(name: str) -> Response:
        if name not in _FILES:
            raise NotFound(f"The page has no file {name}. It has {', '.join(_FILES)}.")
        return respond(name)

    return router


def respond(name: str = PAGE) -> Response:
    """Return a file of the page."""
    media_type = f"{MEDIA_TYPES[Path(name).suffix]}; charset=utf-8"
    return Response(_FILES[name], media_type=media_type, headers=HEADERS)


def is_requested(request: Request) -> bool:
    """Return whether a client of `/` is a browser: only those accept HTML by name."""
    return "text/html" in request.headers.get("accept", "")
