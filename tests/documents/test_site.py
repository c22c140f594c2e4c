"""The site: it builds strictly, needs no other host, and the pages made from the code are complete."""

import inspect
import re
import shutil
import threading
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, get_args

import mkdocs.config
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from mkdocs.commands.build import build
from playwright.sync_api import sync_playwright

from devtools.documentation import findings, pages
from devtools.paths import ROOT
from predictor import errors as predictor_errors
from predictor.entrypoints.ray_settings import RaySettings
from predictor.observability import metrics
from predictor.settings import Settings as PredictorSettings
from preflight.findings import Source
from storage_initializer import errors as initializer_errors
from storage_initializer.settings import Settings as InitializerSettings

CHROMIUM = shutil.which("chromium")
text_of = cache(pages.text_of)


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_: object) -> None:
        pass


class Requests(HTMLParser):
    """The URLs that a browser requests for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        is_loaded = tag != "link" or values.get("rel") not in ("canonical", "next", "prev", "edit")
        names = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}
        if tag in names and is_loaded and (url := values.get(names[tag])):
            self.urls.append(url)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    config = mkdocs.config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_site_builds_strictly_and_requests_nothing_from_other_hosts(site: Path) -> None:
    html = list(site.rglob("*.html"))
    assert len(html) > 60
    for page in html:
        requests = Requests()
        requests.feed(page.read_text())
        assert [url for url in requests.urls if re.match(r"(https?:)?//", url)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.xdist_group("chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_site_in_a_browser_is_accessible_and_requests_nothing_else(
    site: Path, scheme: Literal["light", "dark"], width: int
) -> None:
    requests: list[str] = []
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("request", lambda request: requests.append(request.url))
        for name in ("index", "how-to/own-model", "reference/components"):
            page.goto(f"{url}/{name}.html", wait_until="load")
            results = Axe().run(page)
            assert results.violations_count == 0, results.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        server.shutdown()
    assert len(requests) > 10
    assert [request for request in requests if not request.startswith((url, "data:"))] == []


def test_navigation_has_every_page() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text().replace("!ENV ", ""))["nav"]
    listed = re.findall(r"'([\w/-]+\.md)'", str(navigation))
    folder = ROOT / "docs"
    assert len(listed) == len(set(listed))
    assert set(listed) == {
        str(page.relative_to(folder)) for page in folder.rglob("*.md") if not re.match(r"\d{4}-", page.name)
    }


@pytest.mark.parametrize("name", pages.PAGES)
def test_page_made_from_the_code_is_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == text_of(name), "run: make docs"


def test_settings_page_has_every_flag_and_variable() -> None:
    page = text_of("reference/settings.md")
    for name in PredictorSettings.model_fields:
        assert f"| `--{name}`<br>" in page
        assert f"`PREDICTOR_{name.upper()}`" in page
    for name in RaySettings.model_fields:
        assert f"`PREDICTOR_{name.upper()}`" in page
    for name, field in InitializerSettings.model_fields.items():
        variable = (
            field.validation_alias if isinstance(field.validation_alias, str) else f"STORAGE_INITIALIZER_{name.upper()}"
        )
        assert f"`{variable}`" in page
    # Every row has a meaning.
    assert not re.search(r"^\| `.*\|  \|$", page, re.MULTILINE)


def test_metrics_page_has_every_metric() -> None:
    page = text_of("reference/metrics.md")
    names = re.findall(r'PREFIX \+ "(\w+)"|^ {8}"(\w+)": "|^ {8}\("(\w+)", "', inspect.getsource(metrics), re.MULTILINE)
    assert len(names) > 20
    for name in map("".join, names):
        assert re.search(rf"`kserve_llm_{name}(_total)?`", page), name


def test_errors_page_has_every_error_with_what_to_do() -> None:
    page = text_of("reference/errors.md")
    for module, bases in (
        (predictor_errors, (predictor_errors.StartupError, predictor_errors.RequestError)),
        (initializer_errors, (initializer_errors.InitializerError,)),
    ):
        for name, error in inspect.getmembers(module, inspect.isclass):
            if issubclass(error, bases):
                assert f"`{name}`" in page
    assert "Set --hold_while_loading too." in page


def test_routes_page_has_every_protocol_and_the_routes_without_one() -> None:
    page = text_of("reference/routes.md")
    for route in (
        "POST /v1/chat/completions",
        "POST /v2/models/{model_name}/infer",
        "POST /v1/messages",
        "GET /health",
        "GET /metrics",
        "GET /version",
    ):
        assert f"`{route}`" in page
    assert len(re.findall(r"^\| `(POST|GET) ", page, re.MULTILINE)) > 30


def test_components_page_has_every_component_with_what_it_needs() -> None:
    page = text_of("reference/components.md")
    for folder in (ROOT / "kustomize/components").iterdir():
        assert f"[`{folder.name}`]" in page
    assert "Secret `hf-secret`" in page
    assert "API `monitoring.coreos.com`" in page


def test_findings_page_has_the_findings_of_every_check() -> None:
    page = text_of("reference/findings.md")
    for module in findings.MODULES:
        source = module.read_text()
        found = list(findings.of_module(module))
        # Those that only pass on the text of a parser are left out.
        written = len(re.findall(r"^ +yield \(?\n? *f?\"|^ +yield Finding\(", source, re.MULTILINE))
        assert len(found) >= written // 2, module
        assert {severity for finding in found for severity in finding.severity.split(" or ")} <= {"error", "warning"}
        assert {source for finding in found for source in finding.source.split(" or ")} <= {"", *get_args(Source)}
    assert "PREDICTOR_REQUEST_TIMEOUT_SECONDS is REQUEST and timeout TIMEOUT, so the gateway times out first" in page
