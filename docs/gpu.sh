# Measures the rows of docs/speed.md that need a GPU, then runs the tests that need one. Meant to take
# less than ten minutes on an H100, most of it for compiling; not yet run in this form.
#   bash docs/gpu.sh | tee gpu.txt
# pip install transformers lightly, to have them in the comparison.
set -e
cd "$(dirname "$0")/.."
time_recipes="python tests/benchmark.py --recipes --rounds 2 --steps 6"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python -c "import torch; print('torch', torch.__version__)"
$time_recipes --methods mae/large --settings "bf16 + compile" --batch-size 512
$time_recipes --methods capi/large --settings "bf16 + compile" --batch-size 64 128
$time_recipes --methods mae latent_mim semantic_mim pilamim capi/base --settings "bf16 + compile"
$time_recipes --methods mae --settings bf16 --batch-size 64 128 256 512
python tests/benchmark.py --peers vit_base --settings bf16 "bf16 + compile" --rounds 5 --steps 8
python -m pytest -q tests/test_device.py
