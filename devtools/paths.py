"""Paths of the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "demo" / "model"
ADAPTER = ROOT / "demo" / "adapter"
