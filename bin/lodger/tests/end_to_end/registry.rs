//! A registry of images on the loopback interface, Debian's `docker-registry`, and images for it.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A Debian package, fetched and unpacked once.
pub fn package(name: &str) -> PathBuf {
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _lock = ONE_AT_A_TIME.lock();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("packages")
        .join(name);
    if dir.exists() {
        return dir;
    }
    let scratch = tempfile::tempdir().expect("a folder");
    let run = |script: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-ec", script, "sh", name]);
        shell.current_dir(&scratch).stdout(Stdio::null());
        shell.status().expect("a shell").success()
    };
    // The second way is for a host without package lists.
    let own = "-o Dir::State=$PWD/state -o Dir::Cache=$PWD/cache -o APT::Sandbox::User=";
    let fetched = run("apt-get download -q -q \"$1\" 2>/dev/null")
        || run(&format!(
            "mkdir -p state/lists/partial cache/archives/partial; apt-get {own} -q -q update; apt-get {own} -q -q download \"$1\""
        ));
    assert!(fetched, "{name} can be fetched");
    assert!(
        run("dpkg-deb -x \"$1\"_*.deb unpacked"),
        "{name} can be unpacked"
    );
    std::fs::create_dir_all(dir.parent().expect("a folder")).expect("a folder");
    let mut copy = Command::new("cp");
    copy.arg("-r")
        .arg(scratch.path().join("unpacked"))
        .arg(&dir);
    assert!(copy.status().expect("cp runs").success());
    dir
}

/// A running registry.
pub struct Registry {
    child: Child,
    address: SocketAddr,
    dir: TempDir,
}

/// A layer that a registry has.
#[derive(Clone)]
pub struct Layer {
    descriptor: Value,
    diff_id: String,
}

/// What a layer is compressed with.
#[derive(Clone, Copy)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Registry {
    /// One that everybody may use.
    pub fn start() -> Registry {
        Registry::start_for(None)
    }

    /// One for this user only, with a line of a password file.
    pub fn start_for(user: Option<&str>) -> Registry {
        let dir = tempfile::tempdir().expect("a folder");
        let login = user.map(|line| {
            let path = dir.path().join("htpasswd");
            std::fs::write(&path, line).expect("a file");
            format!(
                "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                path.display()
            )
        });
        let login = login.unwrap_or_default();
        // Free a moment ago.
        let address = TcpListener::bind("127.0.0.1:0")
            .and_then(|l| l.local_addr())
            .expect("a port");
        let config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{address}'}}\n{login}",
            dir.path().join("data").display()
        );
        let path = dir.path().join("config.yml");
        std::fs::write(&path, config).expect("a file");
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let program = PROGRAM.get_or_init(|| {
            let installed = Path::new("/usr/bin/docker-registry");
            match installed.exists() {
                true => installed.into(),
                false => package("docker-registry").join("usr/bin/docker-registry"),
            }
        });
        let child = Command::new(program)
            .arg("serve")
            .arg(&path)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("a registry");
        let start = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the registry listens"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Registry {
            child,
            address,
            dir,
        }
    }

    /// The full name of an image.
    pub fn name(&self, repository: &str) -> String {
        format!("{}/{repository}", self.address)
    }

    /// Where the registry has the bytes of a blob.
    pub fn blob_file(&self, layer: &Layer) -> PathBuf {
        let digest = layer.digest();
        let blobs = self.dir.path().join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&digest[..2]).join(digest).join("data")
    }

    /// Gives the registry a layer.
    pub fn push_layer(&self, repository: &str, archive: &[u8], compression: Compression) -> Layer {
        let (data, kind) = match compression {
            Compression::None => (archive.to_vec(), "tar"),
            Compression::Gzip => {
                let mut gzip =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(archive).expect("memory");
                (gzip.finish().expect("memory"), "tar+gzip")
            }
            Compression::Zstd => (zstd::encode_all(archive, 1).expect("memory"), "tar+zstd"),
        };
        let media_type = format!("application/vnd.oci.image.layer.v1.{kind}");
        Layer {
            descriptor: self.push_blob(repository, &data, &media_type),
            diff_id: digest(archive),
        }
    }

    /// Makes an image of layers. The descriptor of its manifest.
    pub fn push(
        &self,
        repository: &str,
        tag: &str,
        layers: &[&Layer],
        config: Value,
        arch: &str,
    ) -> Value {
        let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.diff_id).collect();
        let config = json!({
            "architecture": arch, "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string();
        let media_type = "application/vnd.oci.image.config.v1+json";
        let layers: Vec<_> = layers.iter().map(|layer| &layer.descriptor).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "layers": layers,
            "config": self.push_blob(repository, config.as_bytes(), media_type),
        });
        self.push_manifest(repository, tag, &manifest)
    }

    /// Makes a list of images: descriptors and their architectures.
    pub fn push_index(&self, repository: &str, tag: &str, images: &[(Value, &str)]) {
        let images = images.iter().map(|(image, arch)| {
            let mut image = image.clone();
            image["platform"] = json!({"architecture": arch, "os": "linux"});
            image
        });
        let images: Vec<_> = images.collect();
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": images});
        self.push_manifest(repository, tag, &index);
    }

    fn push_manifest(&self, repository: &str, tag: &str, manifest: &Value) -> Value {
        let media_type = manifest["mediaType"].as_str().expect("text");
        let text = manifest.to_string();
        let url = format!("http://{}/v2/{repository}/manifests/{tag}", self.address);
        let put = ureq::put(&url).header("Content-Type", media_type);
        put.send(text.as_bytes()).expect("a manifest");
        json!({"mediaType": media_type, "digest": digest(text.as_bytes()), "size": text.len()})
    }

    fn push_blob(&self, repository: &str, data: &[u8], media_type: &str) -> Value {
        let url = format!("http://{}/v2/{repository}/blobs/uploads/", self.address);
        let begun = ureq::post(&url).send_empty().expect("an upload");
        let place = begun.headers().get("Location").expect("a place");
        let place = place.to_str().expect("ASCII");
        let digest = digest(data);
        let put = ureq::put(format!("{place}&digest={digest}"));
        let put = put.header("Content-Type", "application/octet-stream");
        put.send(data).expect("a blob");
        json!({"mediaType": media_type, "digest": digest, "size": data.len()})
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Layer {
    /// Its SHA-256.
    pub fn digest(&self) -> &str {
        let digest = self.descriptor["digest"].as_str().expect("text");
        digest.strip_prefix("sha256:").expect("a SHA-256")
    }
}

/// A tar archive.
pub struct Archive(Builder<Vec<u8>>);

impl Archive {
    pub fn new() -> Archive {
        Archive(Builder::new(Vec::new()))
    }

    fn header(kind: EntryType, mode: u32, owner: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(1_600_000_000);
        header.set_size(0);
        header
    }

    pub fn file(mut self, path: &str, mode: u32, owner: u64, data: &[u8]) -> Archive {
        let mut header = Archive::header(EntryType::Regular, mode, owner);
        header.set_size(data.len() as u64);
        self.0.append_data(&mut header, path, data).expect("memory");
        self
    }

    pub fn dir(mut self, path: &str, mode: u32) -> Archive {
        let mut header = Archive::header(EntryType::Directory, mode, 0);
        self.0
            .append_data(&mut header, path, &[][..])
            .expect("memory");
        self
    }

    pub fn link(mut self, kind: EntryType, path: &str, target: &str) -> Archive {
        let mut header = Archive::header(kind, 0o777, 0);
        self.0
            .append_link(&mut header, path, target)
            .expect("memory");
        self
    }

    pub fn device(mut self, kind: EntryType, path: &str, number: (u32, u32)) -> Archive {
        let mut header = Archive::header(kind, 0o640, 0);
        header.set_device_major(number.0).expect("GNU has it");
        header.set_device_minor(number.1).expect("GNU has it");
        self.0
            .append_data(&mut header, path, &[][..])
            .expect("memory");
        self
    }

    /// An extended attribute of the next file.
    pub fn xattr(mut self, name: &str, value: &str) -> Archive {
        let key = format!("SCHILY.xattr.{name}");
        self.0
            .append_pax_extensions([(key.as_str(), value.as_bytes())])
            .expect("memory");
        self
    }

    pub fn finish(self) -> Vec<u8> {
        self.0.into_inner().expect("memory")
    }
}

fn digest(data: &[u8]) -> String {
    let hash = Sha256::digest(data);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}
