//! Lodger's agent as a file of an image (`guest/agent`), and what starts it.

use crate::tree::Tree;

/// The program, static, for amd64.
pub const PROGRAM: &[u8] = include_bytes!(env!("LODGER_AGENT"));

/// Where it is in an image.
pub(crate) const PATH: &str = "usr/lib/lodger/agent";

/// The module of the kernel by which it talks to the host.
pub(crate) const MODULE: &str = "vmw_vsock_virtio_transport";

/// What starts it where systemd does.
const UNIT: &str = "\
[Unit]
Description=Lodger's agent, which serves lodger exec, cp and ssh

[Service]
ExecStartPre=-/sbin/modprobe vmw_vsock_virtio_transport
ExecStart=/usr/lib/lodger/agent
Restart=on-failure
KillMode=process
";
const UNIT_NAME: &str = "lodger-agent.service";

/// Puts the program into an image.
pub(crate) fn add(tree: &mut Tree) {
    tree.file(PATH, 0o755, PROGRAM.into());
}

/// Has systemd start it.
pub(crate) fn add_unit(tree: &mut Tree) {
    let dir = "etc/systemd/system";
    tree.file(&format!("{dir}/{UNIT_NAME}"), 0o644, UNIT.into());
    let link = format!("{dir}/multi-user.target.wants/{UNIT_NAME}");
    tree.symlink(&link, &format!("../{UNIT_NAME}"));
}
