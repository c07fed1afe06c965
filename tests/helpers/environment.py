"""The environment in which all tests run, and what they are told by it.

One rule: it is set before anything imports vLLM, which reads it once.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
# Scripts that a test starts import the helpers, too.
_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
if str(TESTS) not in _path:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*_path, str(TESTS)]))

CORES = os.cpu_count() or 1
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{CORES - 1}")
# A spinning barrier takes a hundred times longer where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What the first start of a model finds must not be found by the next run's.
if "SELFSPEC_TEST_CACHE" not in os.environ:
    os.environ["SELFSPEC_TEST_CACHE"] = "1"  # of this process and those it starts
    os.environ["VLLM_CACHE_ROOT"] = tempfile.mkdtemp(prefix="selfspec-tests-")
    atexit.register(shutil.rmtree, os.environ["VLLM_CACHE_ROOT"], ignore_errors=True)

# `make test-v2` runs with vLLM's V2 model runner, under Triton's interpreter.
IS_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
# 1 for everything, as in `make test-all`, or `shown`: each row of the support table,
# but not every case of it.
TEST_ALL = os.environ.get("SELFSPEC_TEST_ALL", "")
IS_SHORT = not TEST_ALL
# The interpreter takes seconds for a step; what it runs of a long list is a part then.
IS_PART = IS_V2 and TEST_ALL in ("", "shown")
