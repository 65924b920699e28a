#!/bin/sh
# Finds a Docker engine that answers, or (as root on Debian or Ubuntu, where none is
# installed) installs and starts one. Prints what it does, a line before it does it.
#
#   docker/engine.sh            make sure that an engine answers
#   docker/engine.sh stop       stop the engine that this script started
#
# SGLANG_HARNESS_INSTALL=never   never install or start anything
# DOCKER_HOST                    honoured; an engine elsewhere is never started from here
#
# Exit codes: 0 an engine answers, 3 none can be had (one line says why).
set -eu

state_dir=${SGLANG_HARNESS_STATE:-/var/run/sglang-harness}
pid_file=$state_dir/dockerd.pid
log_file=$state_dir/dockerd.log

say() { printf 'engine: %s\n' "$*"; }
refuse() { printf 'engine: %s\n' "$*" >&2; exit 3; }
answers() { command -v docker >/dev/null 2>&1 && timeout 20 docker info >/dev/null 2>&1; }

stop() {
    [ -s "$pid_file" ] || { say "nothing to stop: no engine was started by this script"; exit 0; }
    pid=$(cat "$pid_file")
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then
        kill "$pid"
        i=0
        while kill -0 "$pid" 2>/dev/null; do
            i=$((i + 1))
            [ "$i" -le 60 ] || refuse "dockerd (pid $pid) did not end within 60 s of SIGTERM"
            sleep 1
        done
        say "stopped dockerd (pid $pid)"
    else
        say "the engine that was started (pid $pid) is already gone"
    fi
    rm -f "$pid_file"
}

install_engine() {
    [ "$(id -u)" = 0 ] || refuse "no Docker engine is installed, and only root can install one. Install Docker and add yourself to the group 'docker'."
    command -v apt-get >/dev/null 2>&1 || refuse "no Docker engine is installed, and this is not Debian or Ubuntu. Install Docker, then run this again."
    say "no Docker engine here: installing Debian's package docker.io with apt-get (SGLANG_HARNESS_INSTALL=never forbids this)"
    # An unreachable third-party list must not stop an installation that does not need it.
    apt-get update -qq >"$log_file.apt" 2>&1 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker.io iptables ca-certificates \
        >>"$log_file.apt" 2>&1 || { tail -n 5 "$log_file.apt" >&2; refuse "apt-get could not install docker.io (whole output: $log_file.apt)"; }
}

start_engine() {
    [ "$(id -u)" = 0 ] || refuse "the Docker engine is installed but not running, and only root can start it. Start it (systemctl start docker), then run this again."
    if [ -d /run/systemd/system ]; then
        say "starting the installed Docker engine: systemctl start docker"
        systemctl start docker || refuse "systemctl start docker failed; 'journalctl -u docker' says why"
    else
        say "starting dockerd in the background (log: $log_file)"
        # Left over from an engine that was killed: dockerd refuses to start beside it.
        left=$(cat /var/run/docker.pid 2>/dev/null || true)
        if [ -n "$left" ] && [ "$(cat "/proc/$left/comm" 2>/dev/null)" != dockerd ]; then
            rm -f /var/run/docker.pid
        fi
        setsid nohup dockerd >"$log_file" 2>&1 </dev/null &
        echo $! >"$pid_file"
    fi
    i=0
    until answers; do
        i=$((i + 1))
        if [ -s "$pid_file" ] && ! kill -0 "$(cat "$pid_file")" 2>/dev/null; then
            tail -n 5 "$log_file" >&2
            rm -f "$pid_file"
            refuse "dockerd ended while starting (whole log: $log_file)"
        fi
        [ "$i" -le 60 ] || refuse "the engine did not answer 'docker info' within 60 s"
        sleep 1
    done
    say "the Docker engine answers; it is left running. To stop it: $0 stop"
}

case "${1:-ensure}" in
    stop) stop; exit 0 ;;
    ensure) ;;
    *) refuse "unknown word '$1'; use 'docker/engine.sh' or 'docker/engine.sh stop'" ;;
esac

if answers; then
    exit 0
fi
case "${DOCKER_HOST:-unix:///var/run/docker.sock}" in
    unix:///var/run/docker.sock | unix:///run/docker.sock) ;;
    *) refuse "the Docker engine at DOCKER_HOST=$DOCKER_HOST does not answer; check that it runs, or unset DOCKER_HOST" ;;
esac
if [ "${SGLANG_HARNESS_INSTALL:-}" = never ]; then
    refuse "no Docker engine answers, and SGLANG_HARNESS_INSTALL=never forbids installing or starting one"
fi
mkdir -p "$state_dir"
command -v dockerd >/dev/null 2>&1 || install_engine
start_engine
