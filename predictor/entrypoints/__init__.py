"""How requests come in: process lifecycle, HTTP, gRPC and KServe."""
