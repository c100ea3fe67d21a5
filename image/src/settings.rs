//! How a Debian image is set up, beyond what its packages do: names, network,
//! console, and what does not run.

use crate::agent;
use crate::cache::BuildOptions;
use crate::tree::{Kind, Node, Tree};

const UNITS: &str = "etc/systemd/system";
/// Where packages have their units.
const PACKAGE_UNITS: &str = "/lib/systemd/system";

/// Files that a build leaves with a time, a random number or a log in them.
const LEFTOVERS: &[&str] = &[
    "etc/.pwd.lock",
    "etc/group-",
    "etc/gshadow-",
    "etc/passwd-",
    "etc/shadow-",
    "etc/subgid-",
    "etc/subuid-",
    "etc/machine-id",
    "etc/resolv.conf",
    "lodger",
    "root/.bash_history",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/cache/ldconfig/aux-cache",
    "var/lib/dpkg/available-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/dpkg/triggers/Unincorp",
    "var/lib/systemd/random-seed",
    "var/log/alternatives.log",
    "var/log/apt",
    "var/log/bootstrap.log",
    "var/log/dpkg.log",
    "var/log/faillog",
    "var/log/lastlog",
];

/// Units that a machine of this kind has no use for, or that would do nothing on it, slowly.
const MASKED: &[&str] = &[
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "getty-static.service",
    "kmod-static-nodes.service",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-networkd-wait-online.service",
    "systemd-pstore.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
];

const NETWORK: &str = "\
[Match]
Type=ether

[Network]
DHCP=yes
";

const HOSTS: &str = "\
127.0.0.1 localhost
127.0.1.1 debian
::1 localhost ip6-localhost ip6-loopback
";

/// Keys come with the first connection, because making them takes long on a slow processor. They come before the check of the
/// configuration, which misses them otherwise.
const SSH: &str = "\
[Service]
ExecStartPre=
ExecStartPre=/bin/sh -c 'test -e /etc/ssh/ssh_host_ed25519_key || ssh-keygen -q -t ed25519 -N \"\" -f /etc/ssh/ssh_host_ed25519_key'
";
const SSHD_CONFIG: &str = "\
HostKey /etc/ssh/ssh_host_ed25519_key
";

/// Without a message bus there are no sessions to manage.
const LOGIND: &str = "\
[Unit]
ConditionPathExists=/usr/bin/dbus-daemon
";

/// A serial line does not tell its size: `lodger run` does, on the kernel command line.
const PROFILE: &str = "\
case $(tty) in
/dev/console | /dev/ttyS0)
	read -r cmdline </proc/cmdline
	case $cmdline in
	*lodger.size=*)
		size=${cmdline#*lodger.size=}
		size=${size%% *}
		stty rows \"${size%x*}\" cols \"${size#*x}\"
		;;
	esac
	unset cmdline size
	;;
esac
";

/// Sets up a tree whose packages are installed.
pub(crate) fn apply(tree: &mut Tree, options: &BuildOptions, sources_list: &str) {
    tree.retain(|path| {
        !LEFTOVERS.iter().any(|leftover| {
            path.strip_prefix(leftover)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }) && !is_host_key(path)
    });
    if let Some(tmp) = tree.get_mut("tmp") {
        tmp.permissions = 0o1777;
    }
    let mut text = |path: &str, data: &str| tree.file(path, 0o644, data.into());
    // It is empty, so that each machine gets its own when it starts.
    text("etc/machine-id", "");
    text("etc/hostname", "debian\n");
    text("etc/hosts", HOSTS);
    text(
        "etc/fstab",
        "# The root disk is mounted by the initial RAM disk.\n",
    );
    text("etc/default/locale", "LANG=C.UTF-8\n");
    text("etc/apt/sources.list", sources_list);
    text("etc/systemd/network/80-ethernet.network", NETWORK);
    text("etc/ssh/sshd_config.d/lodger.conf", SSHD_CONFIG);
    text("etc/profile.d/lodger.sh", PROFILE);
    let user = options.user.as_deref().unwrap_or("root");
    text(
        &format!("{UNITS}/console-getty.service.d/login.conf"),
        &format!(
            "[Service]\nExecStart=\n\
             ExecStart=-/sbin/agetty --autologin {user} --noclear --keep-baud console 115200 vt220\n"
        ),
    );
    // Which of the two the socket starts depends on the package.
    for unit in ["ssh", "ssh@"] {
        text(&format!("{UNITS}/{unit}.service.d/keys.conf"), SSH);
    }
    text(
        &format!("{UNITS}/systemd-logind.service.d/bus.conf"),
        LOGIND,
    );

    agent::add(tree);
    agent::add_unit(tree);
    tree.symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf");
    if tree.get("var/lib/dbus").is_some() {
        tree.symlink("var/lib/dbus/machine-id", "/etc/machine-id");
    }
    for unit in MASKED {
        tree.symlink(&format!("{UNITS}/{unit}"), "/dev/null");
    }
    // The console has a getty of its own, which does not wait for udev.
    tree.symlink(
        "etc/systemd/system-generators/systemd-getty-generator",
        "/dev/null",
    );
    for (target, unit) in [
        ("getty.target", "console-getty.service"),
        ("multi-user.target", "systemd-networkd.service"),
        ("sockets.target", "ssh.socket"),
    ] {
        let link = format!("{UNITS}/{target}.wants/{unit}");
        tree.symlink(&link, &format!("{PACKAGE_UNITS}/{unit}"));
    }
    let unwanted = [
        "getty.target.wants/getty@tty1.service",
        "multi-user.target.wants/ssh.service",
        "sshd.service",
        "timers.target.wants/e2scrub_all.timer",
        "timers.target.wants/apt-daily.timer",
        "timers.target.wants/apt-daily-upgrade.timer",
    ]
    .map(|unit| format!("{UNITS}/{unit}"));
    tree.retain(|path| !unwanted.iter().any(|unit| unit == path));
    login(tree, options);
}

/// The keys of whoever may log in, and what the user may do.
fn login(tree: &mut Tree, options: &BuildOptions) {
    let (home, owner) = match &options.user {
        Some(user) => (format!("home/{user}"), (1000, 1000)),
        None => ("root".to_owned(), (0, 0)),
    };
    if !options.ssh_keys.is_empty() {
        let mut dir = Node::new(0o700, Kind::Dir);
        dir.owner = owner;
        tree.insert(&format!("{home}/.ssh"), dir);
        let path = format!("{home}/.ssh/authorized_keys");
        let keys: String = options
            .ssh_keys
            .iter()
            .map(|key| format!("{}\n", key.trim()))
            .collect();
        tree.file(&path, 0o600, keys.into());
        if let Some(file) = tree.get_mut(&path) {
            file.owner = owner;
        }
    }
    if let Some(user) = &options.user {
        let rule = format!("{user} ALL=(ALL:ALL) NOPASSWD:ALL\n");
        tree.file("etc/sudoers.d/lodger", 0o440, rule.into());
    }
}

fn is_host_key(path: &str) -> bool {
    path.strip_prefix("etc/ssh/ssh_host_").is_some()
}
