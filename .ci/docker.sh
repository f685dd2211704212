# shellcheck shell=bash
# Functions of .ci/run: packages, a docker daemon, and the image of the tests. The image takes the usual variables:
# POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB, PGDATA.

dockerd_pid=""
work=""

# clean_up: what this run started or left half made, and nothing else.
clean_up() {
    [ -z "$work" ] || rm -rf "$work"
    stop_docker
}

say() { printf '\n== %s\n' "$*" >&2; }

die() {
    printf '.ci/run: %s\n' "$*" >&2
    exit 1
}

# apt_install PACKAGE...: the package lists are read again first; those of a fresh machine are empty or old.
apt_install() {
    [ "$(id -u)" = 0 ] || die "the packages $* are missing: run as root, or install them"
    say "installing $*"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# need_commands COMMAND...: install what is missing; package and command have one name here.
need_commands() {
    local missing=() command
    for command in "$@"; do
        command -v "$command" >/dev/null || missing+=("$command")
    done
    [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
}

# Debian's python3 comes without what `python3 -m venv` needs.
need_venv() {
    python3 -c 'import ensurepip, venv' 2>/dev/null || apt_install python3 python3-venv
}

docker_answers() { docker version >/dev/null 2>&1; }

# start_docker OPTION...: a daemon that answers within 30 s, or 1.
start_docker() {
    local log=/var/log/gathering-dockerd.log
    # A session of its own: an interrupted run stops it by its trap, in order, and not by the terminal's signal.
    setsid dockerd "$@" >"$log" 2>&1 &
    dockerd_pid=$!
    for _ in $(seq 150); do
        docker_answers && return 0
        kill -0 "$dockerd_pid" 2>/dev/null || break
        sleep 0.2
    done
    tail -n 3 "$log" >&2
    stop_docker
    return 1
}

stop_docker() {
    [ -n "$dockerd_pid" ] || return 0
    kill "$dockerd_pid" 2>/dev/null || true
    wait "$dockerd_pid" 2>/dev/null || true
    dockerd_pid=""
}

need_docker() {
    if ! command -v dockerd >/dev/null && ! docker_answers; then
        apt_install docker.io
    fi
    # Installing the package may have started the service already.
    for _ in 1 2 3 4 5; do
        docker_answers && return 0
        [ -e /run/docker.pid ] || break
        sleep 1
    done
    say "starting a docker daemon"
    # Plain settings first. In a container overlayfs can't lie on overlayfs, and where the kernel has no packet filter
    # dockerd's own proxy still leads from localhost to the port.
    start_docker ||
        start_docker --storage-driver=vfs ||
        start_docker --iptables=false --ip6tables=false ||
        start_docker --storage-driver=vfs --iptables=false --ip6tables=false ||
        die "no docker daemon can be started here, and the tests need one"
}

# Makes the image of PostgreSQL from Debian's packages and sets GATHERING_TEST_IMAGE. The tag holds a digest of the recipe:
# an image of an older one is never taken by mistake.
build_image() {
    local digest sources
    digest=$(cat .ci/docker.sh .ci/entrypoint.sh | sha256sum | cut -c1-12)
    GATHERING_TEST_IMAGE="gathering-pipeline-postgres:15-$digest"
    if docker image inspect "$GATHERING_TEST_IMAGE" >/dev/null 2>&1; then
        return 0
    fi
    say "building $GATHERING_TEST_IMAGE"
    command -v mmdebstrap >/dev/null || apt_install mmdebstrap
    # The system's own sources: the mirror that works here is known to apt and to nobody else.
    sources=/etc/apt/sources.list.d/debian.sources
    [ -e "$sources" ] || sources=/etc/apt/sources.list
    work=$(mktemp -d)
    mmdebstrap --quiet --variant=essential --include=postgresql-15 \
        --customize-hook='copy-in .ci/entrypoint.sh /' --customize-hook='chmod 755 "$1/entrypoint.sh"' \
        bookworm "$work/rootfs.tar" <"$sources"
    docker import \
        --change 'ENV PATH=/usr/lib/postgresql/15/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin' \
        --change 'ENV PGDATA=/var/lib/postgresql/data' --change 'ENV LANG=C.UTF-8' \
        --change 'ENTRYPOINT ["/entrypoint.sh"]' --change 'CMD ["postgres"]' --change 'EXPOSE 5432' \
        "$work/rootfs.tar" "$GATHERING_TEST_IMAGE" >/dev/null
    rm -rf "$work"
}
