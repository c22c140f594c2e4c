"""Run a documented `curl` against the servers of the test, whatever its host; on other ports than theirs, do nothing.

SERVERS is a JSON object: task of a model to the port and the name under which it is served.
"""

import json
import os
import re
import sys
from urllib.parse import urlsplit

PORTS = {None, 80, 443, 8000, 8080}
"""Ports of the predictor: of a gateway, of Ray Serve's proxy and its own."""
LOCAL = re.compile(r"127\.0\.0\.1|localhost|.*\.example\.(com|org)|.*\.svc(\.cluster\.local)?")
DOCUMENTED = "llm|demo|arithmetic|model|embedder|reranker"
"""Names that documents give to models."""
TASKS = {"/v1/embeddings": "embed", "/v1/rerank": "classify", "/rerank": "classify", "/score": "classify"}

urls = [word for word in sys.argv[1:] if re.match(r"https?://", word)]
assert len(urls) == 1, f"curl needs one URL that starts with http:// or https://: {sys.argv[1:]}"
parts = urlsplit(urls[0])
if not LOCAL.fullmatch(parts.hostname or "") or parts.port not in PORTS:
    sys.exit()
port, name = json.loads(os.environ["SERVERS"])[TASKS.get(parts.path, "generate")]
arguments = []
for word in sys.argv[1:]:
    word = re.sub(rf"/models/({DOCUMENTED})(?![\w.-])", f"/models/{name}", word)
    word = re.sub(rf'("model": ?)"({DOCUMENTED})"', rf'\1"{name}"', word)
    # The prefix is that of the second application of overlay rayservice.
    arguments.append(re.sub(r"^https?(://[^/]+)(/cpu(?=/))?", r"http\1", word))
options = ["--fail-with-body", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60"]
os.execv(os.environ["REAL_CURL"], ["curl", *options, "--connect-to", f"::127.0.0.1:{port}", *arguments])  # noqa: S606
