# Get from Debian what the tests need beside Python, where it is missing and this machine allows it; say what will be skipped where it does not.
missing=""
need() { command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] || missing="$missing $2"; }
need npm "nodejs npm"
command -v google-chrome >/dev/null || [ -n "$CHROMIUM" ] || need chromium "chromium fonts-dejavu-core" # the site and JupyterLab
need sshd openssh-server # two hosts: chapter 05e
need pdsh pdsh
need ip iproute2
need prometheus prometheus # alerts that fire: chapter 05f
if [ "$(id -u)" = 0 ]; then # images that are built and started: chapter 10f; nobody else may mount
  need debootstrap debootstrap
  need buildah buildah
  need podman podman
  need runc runc
  need catatonit catatonit # process 1 of a pod
  need conmon conmon # holds a container's end
  need nginx nginx-light # two servers behind one address: chapter 10d
fi
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=400 install -y --no-install-recommends $missing; } >/dev/null 2>&1 && exit 0
  echo "could not install$missing: tests that need them are skipped"
else
  echo "$missing not here, and no root to install them: tests that need them are skipped"
fi
