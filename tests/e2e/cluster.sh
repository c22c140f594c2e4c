#!/usr/bin/env bash
# Tests overlay dev on kubectl's cluster in both deployment modes, with images that its node has already; prints a report and exits by it:
#
#   tests/e2e/cluster.sh [--kubeconfig FILE] [--context NAME] [knative|standard|both]
#
# Needs kubectl and Python 3.11, and no package. For a cluster with one node and KServe. --help lists all options.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m tests.e2e.cluster "$@"
