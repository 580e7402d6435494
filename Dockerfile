# Temper with all it needs; the sweep's folder is mounted on /work. See docs/containers.md.
#
#     docker build --tag temper .
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" temper --cores all --config experiment=demo
#
# For an image without CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.11-slim

ARG TORCH_INDEX=https://pypi.org/simple
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# As the Makefile installs it. An edit to the code repeats the last layer only.
WORKDIR /opt/temper
COPY requirements.lock ./
RUN python -m pip install --require-hashes --no-deps -r requirements.lock \
    && python -m pip install --index-url "$TORCH_INDEX" torch==2.13.0
COPY . .
RUN python -m pip install --no-deps --no-build-isolation -e . \
    && python -m compileall -q steps temper \
    && useradd --create-home --uid 1000 temper \
    && install --directory --owner temper /work

# Whoever runs it (docker run --user), libraries find a folder to write their caches to.
ENV XDG_CACHE_HOME=/tmp/cache XDG_CONFIG_HOME=/tmp/config
USER 1000
WORKDIR /work
ENTRYPOINT ["snakemake", "--snakefile", "/opt/temper/Snakefile"]
CMD ["--help"]
