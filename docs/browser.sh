# Get Node.js, npm and Chromium from Debian where they are missing and this machine allows it; say what will be skipped where it does not.
missing=""
command -v npm >/dev/null || missing="nodejs npm"
command -v chromium >/dev/null || command -v google-chrome >/dev/null || [ -n "$CHROMIUM" ] || missing="$missing chromium fonts-dejavu-core"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update && apt-get -o DPkg::Lock::Timeout=400 install -y --no-install-recommends $missing; } >/dev/null 2>&1 && exit 0
  echo "browser tests: could not install $missing: tests that need them are skipped"
else
  echo "browser tests: $missing not here, and no root to install them: tests that need them are skipped"
fi
