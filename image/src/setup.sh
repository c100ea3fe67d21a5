#!/bin/sh
# PID 1 of the machine that finishes an image: the packages are unpacked, and
# here, where everybody is root, their scripts run. /lodger has what the build
# gives, /dev/vdb takes what has changed as a tar archive.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true
exec </dev/null >/dev/console 2>&1
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mkdir -p /run/lock

finish() {
	echo "LODGER-SETUP $1"
	sync
	systemctl --quiet poweroff -ff
	sleep 100
}

fail() {
	cat /run/setup.log
	# The host tells its user the last lines.
	grep -B 1 -A 1 -m 1 'dpkg: error processing' /run/setup.log
	finish "failed: $1"
}

. /lodger/settings # epoch, release, user
[ "$(date +%s)" -gt "$epoch" ] || fail "the clock of the host is behind that of its packages"

# No service starts here.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d

# Host keys that are there are not made, which takes minutes on a slow processor;
# no image has any.
mkdir -p /etc/ssh
for type in rsa ecdsa ed25519; do
	: >/etc/ssh/ssh_host_${type}_key
done

export DPKG_MAINTSCRIPT_ARCH=amd64 DPKG_MAINTSCRIPT_NAME=preinst DPKG_RUNNING_VERSION=1.21
while read -r package; do
	script=/var/lib/dpkg/info/$package.preinst
	[ -x "$script" ] || continue
	export DPKG_MAINTSCRIPT_PACKAGE="${package%:*}"
	"$script" install >>/run/setup.log 2>&1 || fail "$package.preinst"
done </lodger/packages
unset DPKG_MAINTSCRIPT_ARCH DPKG_MAINTSCRIPT_NAME DPKG_MAINTSCRIPT_PACKAGE DPKG_RUNNING_VERSION

# What is told by status is how far it has come.
dpkg --configure -a --force-unsafe-io --status-fd 3 3>&1 >>/run/setup.log 2>&1 || fail "dpkg --configure"

depmod "$release" || fail depmod
if [ -n "$user" ]; then
	groups=
	for group in adm sudo systemd-journal; do
		! getent group $group >/run/group || groups=$groups,$group
	done
	useradd --create-home --shell /bin/bash --uid 1000 --groups "${groups#,}" "$user" ||
		fail "useradd $user"
fi
rm /usr/sbin/policy-rc.d

# The same packages give the same image on any day.
days=$((epoch / 86400))
sed -E -i "s/^([^:]*:[^:]*:)[0-9]+:/\1$days:/" /etc/shadow

cd / || fail cd
find . -xdev -mindepth 1 -printf '%P\n' >/run/lodger-paths
find . -xdev -mindepth 1 -newerct "@$epoch" -printf '%P\n' >/run/changed
tar --create --file /dev/vdb --format pax --numeric-owner --xattrs '--xattrs-include=*' --no-recursion \
	-C /run lodger-paths -C / --verbatim-files-from --files-from /run/changed >>/run/setup.log 2>&1
[ $? -le 1 ] || fail tar
finish ok
