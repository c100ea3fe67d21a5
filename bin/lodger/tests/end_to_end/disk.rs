//! `lodger disk`.

use std::path::Path;

use crate::process::lodger;

fn text(path: &Path) -> &str {
    path.to_str().expect("ASCII")
}

#[test]
fn images_are_made_described_converted_and_grown() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let (a, b, top) = (path("a.qcow2"), path("b.img"), path("top.qcow2"));
    let (a, b, top) = (text(&a), text(&b), text(&top));
    let made = lodger(&["disk", "create", a, "1G"]).expect(0);
    assert!(made.stderr.contains("qcow2, 1 GiB"), "{}", made.stderr);
    lodger(&["disk", "create", a, "1G"]).expect(1);
    lodger(&["disk", "resize", a, "+1G"]).expect(0);
    lodger(&["disk", "resize", a, "1G"]).expect(2);
    let info = lodger(&["disk", "info", a, "--json"]).expect(0).text();
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!(info["size"], 2_u64 << 30);
    assert_eq!(info["format"], "qcow2");
    lodger(&["disk", "convert", a, b]).expect(0);
    assert_eq!(std::fs::metadata(b).expect("a file").len(), 2 << 30);
    lodger(&["disk", "create", top, "--backing", "b.img"]).expect(0);
    let info = lodger(&["disk", "info", top]).expect(0).text();
    assert!(info.contains("b.img (raw)"), "{info}");
    let check = lodger(&["disk", "check", top]).expect(0).text();
    assert!(check.contains("it is sound"), "{check}");
    let refused = lodger(&["run", "--disk", top]).expect(1);
    assert!(
        refused.stderr.contains("format=qcow2"),
        "{}",
        refused.stderr
    );
    // A reference count that is too high: a cluster that nobody uses.
    let mut bytes = std::fs::read(a).expect("the image");
    bytes[2 * 65536 + 1] = 2;
    std::fs::write(a, bytes).expect("the image");
    let check = lodger(&["disk", "check", a]).expect(3).text();
    assert!(check.contains("1 clusters that nobody uses"), "{check}");
    lodger(&["disk", "check", a, "--repair"]).expect(0);
    lodger(&["disk", "check", a]).expect(0);
}
