# dpa4 for NVIDIA GPUs. PyTorch brings its CUDA libraries; the driver comes from the host (NVIDIA Container Toolkit).
#
#   docker build --tag dpa4 .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:/work" dpa4 train run.yaml
#
# Compiled code is kept in /work/.cache, that is, in the folder where the command was started.
FROM python:3.12-slim-bookworm

ARG EXTRAS="torchsim,phonon,symmetry,d3,tensorboard"

# Triton and the C++ kernels for a CPU need a compiler when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/dpa4
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir ".[${EXTRAS}]"

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/work
WORKDIR /work
ENTRYPOINT ["dpa4"]
CMD ["--help"]
