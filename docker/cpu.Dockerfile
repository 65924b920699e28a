# Real SGLang on any x86-64 CPU, AVX-512 or not. Built by build.sh, which puts every wheel
# into the build context, so that the build itself needs no network, no index and no secret.
# No BuildKit syntax: Debian's own engine builds it too.
ARG BASE_IMAGE
FROM ${BASE_IMAGE} AS dependencies
COPY requirements-cpu.txt /build/
COPY wheels /build/wheels
RUN python3 -m venv /opt/sglang \
 && /opt/sglang/bin/pip install --quiet --no-cache-dir --no-compile --no-deps --no-index \
        --find-links=/build/wheels --requirement=/build/requirements-cpu.txt sglang-cpu-stand-ins
# What a CPU never reads: tools and libraries for two GPU vendors, C++ headers, test suites.
# SGLang was seen to start and answer right without them. (torch needs torch_shm_manager to
# be imported; a file that no Python compiles is no reason to stop.)
RUN cd /opt/sglang/lib/python3*/site-packages \
 && rm -rf triton/backends/nvidia/bin triton/backends/nvidia/lib triton/backends/amd/lib \
        torch/include torch/test caffe2 torch/share/cmake \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && find . -type d \( -name tests -o -name test \) -path '*/numba/*' -prune -exec rm -rf {} + \
 && { /opt/sglang/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash . || true; }

FROM dependencies AS sglang
COPY sglang /build/sglang
RUN /opt/sglang/bin/pip install --quiet --no-cache-dir --no-compile --no-deps --no-index \
        --find-links=/build/sglang --target=/build/sglang-only sglang \
 && rm -rf /build/sglang-only/bin \
 && { /opt/sglang/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash \
        -s /build/sglang-only -p "$(echo /opt/sglang/lib/python3*/site-packages)" /build/sglang-only || true; } \
 && mkdir -p "/build/root$(echo /opt/sglang/lib/python3*)" \
 && mv /build/sglang-only "/build/root$(echo /opt/sglang/lib/python3*)/site-packages"

FROM ${BASE_IMAGE}
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin sglang
COPY --from=dependencies /opt/sglang /opt/sglang
# sglang wants its own home for caches; with a read-only root it gets a tmpfs on /tmp.
# Threads of one operation wait for each other asleep: two that spin, while something else has
# their cores, take five times as long for a token (and no less on a machine that is quiet).
# What SGLang would have torch compile (the choice of experts) needs a C++ compiler, which is
# not here: it computes with plain torch.
ENV PATH=/opt/sglang/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    SGLANG_USE_CPU_ENGINE=1 \
    TORCH_COMPILE_DISABLE=1 \
    OMP_WAIT_POLICY=passive \
    TOKENIZERS_PARALLELISM=false
USER sglang
WORKDIR /tmp
EXPOSE 30000
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "sglang.launch_server"]
LABEL org.sglang-harness.device=cpu
# The sglang wheel alone: another version costs this layer and nothing below it.
COPY --from=sglang /build/root /
