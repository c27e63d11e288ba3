#!/bin/sh
# In the build of the image, after the lock is installed: adds elastic-pt to /opt/venv, describes the image in an SBOM, and makes
# /opt/venv small and the same at each build.
set -eu
packages=$(/opt/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")

/opt/venv/bin/pip install --quiet --no-deps --no-build-isolation .
/opt/venv/bin/pip check
/opt/venv/bin/pip uninstall --quiet --yes pip
mkdir -p /usr/share/elastic-pt
/opt/tools/bin/python deploy/image/sbom.py /opt/venv/bin/python >/usr/share/elastic-pt/sbom.cdx.json

# Nobody installs or tests in the image, or links against its libraries. It serves no Arrow Flight and no TensorBoard. Headers are for
# train.compile, which needs a compiler. Symbols that no linker needs are a fifth of torch's largest library.
cd "$packages"
find . -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
find torch/bin -type f -not -name torch_shm_manager -delete
rm -rf pyarrow/include pyarrow/*flight* tensorboard_data_server/bin torch/share
command -v c++ >/dev/null || rm -rf torch/include
strip --strip-unneeded torch/lib/libtorch_*.so

# The root file system is read-only later, so bytecode is written now. It is not compared with the time of its source. A few files of
# torch have the syntax of a newer Python: they are left without.
PYTHONHASHSEED=0 /opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash . || true
# Nothing that elastic-pt imports was removed.
/opt/venv/bin/python - <<'END'
import importlib, pkgutil, elastic_pt
for module in pkgutil.walk_packages(elastic_pt.__path__, "elastic_pt."):
    importlib.import_module(module.name)
END

find /opt/venv /usr/share/elastic-pt -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
