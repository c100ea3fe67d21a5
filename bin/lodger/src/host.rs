//! What the host has left for a machine, as /proc and control groups tell it.

use std::fs;
use std::path::Path;

/// Bytes of memory that can still be had, by the host and by the control groups this process is in; `None` if the
/// host does not tell.
pub fn memory_available() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let host = field(&meminfo, "MemAvailable:")? << 10;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    // Version 2 only: a single line.
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    Some(host.min(group.and_then(left_in_groups).unwrap_or(u64::MAX)))
}

/// What the group and those around it leave.
fn left_in_groups(group: &str) -> Option<u64> {
    let root = Path::new("/sys/fs/cgroup");
    let inner = root.join(group);
    let groups = inner.ancestors().take_while(|dir| dir.starts_with(root));
    groups.filter_map(left_in_group).min()
}

fn left_in_group(dir: &Path) -> Option<u64> {
    let number =
        |name| -> Option<u64> { fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok() };
    Some(number("memory.max")?.saturating_sub(number("memory.current")?))
}

/// The number behind `name` in a file of lines like `MemTotal:   16 kB`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The processor's name.
pub fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |line: &str| {
        Some(
            line.strip_prefix("model name")?
                .split_once(':')?
                .1
                .trim()
                .to_owned(),
        )
    };
    info.lines()
        .find_map(value)
        .unwrap_or_else(|| "unknown".into())
}

/// Whether this host runs under a hypervisor itself.
pub fn is_virtual() -> bool {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| line.split_whitespace().any(|flag| flag == "hypervisor"))
}

/// A number in a file of /proc/sys.
pub fn setting(name: &str) -> Option<u64> {
    let text = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn fields_of_meminfo() {
        let text = "MemTotal:       24663208 kB\nMemFree:  12 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(super::field(text, "MemAvailable:"), Some(23_000_000));
        assert_eq!(super::field(text, "Hugepagesize:"), None);
        assert_eq!(super::field("MemFree: many", "MemFree:"), None);
    }
}
