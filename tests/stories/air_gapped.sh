#!/usr/bin/env bash
# docs/stories.md, "A cluster without a network": the project's wheel, installed without any index, in another directory. The whole
# wheelhouse holds torch, gigabytes: tools/wheelhouse.sh collects it.
. "$(dirname "$0")/common.sh"
python="${STORY_PYTHON:-python3}"
source_tree="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cp -r "$source_tree"/{setup.py,pyproject.toml,README.md,LICENSE,hope_megatron,data_pipeline,launch,configs} .
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir wheelhouse .
"$python" -m pip install --quiet --no-deps --no-index --find-links wheelhouse --target installed hope_megatron
mkdir elsewhere && cd elsewhere
PYTHONPATH="$PWD/../installed" "$python" -m hope_megatron list models > models.txt
grep -q hope_760m models.txt
PYTHONPATH="$PWD/../installed" "$python" -m hope_megatron plan hope_340m --world 8 > plan.txt
PYTHONPATH="$PWD/../installed" "$python" -c 'import hope_megatron, sys; sys.exit("installed" not in hope_megatron.__file__)'
