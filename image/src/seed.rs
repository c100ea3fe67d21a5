//! What a guest with cloud-init is told at its first start: a small disk labelled CIDATA.
//!
//! See cloud-init's documentation, "NoCloud". The file system is FAT, in which times are those of 1980: the same seed
//! gives the same bytes.

use std::fs::File;
use std::io::{self, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::manifest::hexadecimal;

/// Bytes of the smallest disk, and what the files may take of it.
const SIZE: u64 = 1 << 20;
const LABEL: [u8; 11] = *b"CIDATA     ";
/// Bytes that all files together may have.
pub const MOST_SEED: u64 = 64 << 20;

/// The files of a seed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seed {
    /// What is to be set up.
    pub user_data: Vec<u8>,
    /// Which machine it is.
    pub meta_data: Vec<u8>,
    /// Its network, if not by DHCP.
    pub network_config: Option<Vec<u8>>,
}

impl Seed {
    /// A configuration (which is YAML, and so may be JSON) that makes this user, who may do what root may, with these SSH keys;
    /// without a user the keys are the distribution's own user's.
    pub fn user_data(user: Option<&str>, ssh_keys: &[String]) -> Vec<u8> {
        let mut config = Map::new();
        match user {
            Some(name) => {
                let user = json!({
                    "name": name,
                    "shell": "/bin/bash",
                    "sudo": "ALL=(ALL) NOPASSWD:ALL",
                    "lock_passwd": true,
                    "ssh_authorized_keys": ssh_keys,
                });
                config.insert("users".into(), json!([user]));
            }
            None if !ssh_keys.is_empty() => {
                config.insert("ssh_authorized_keys".into(), json!(ssh_keys));
            }
            None => {}
        }
        format!("#cloud-config\n{:#}\n", Value::Object(config)).into_bytes()
    }

    /// Which machine it is: another one if it is to be set up otherwise.
    pub fn meta_data(hostname: Option<&str>, user_data: &[u8]) -> Vec<u8> {
        let mut hash = Sha256::new();
        hash.update(user_data);
        hash.update([0]);
        hash.update(hostname.unwrap_or_default());
        let mut data = json!({"instance-id": format!("lodger-{}", &hexadecimal(hash)[..16])});
        if let Some(hostname) = hostname {
            data["local-hostname"] = json!(hostname);
        }
        format!("{data:#}\n").into_bytes()
    }

    /// Writes the disk.
    pub fn write(&self, disk: &mut File) -> io::Result<()> {
        let files = [
            ("user-data", Some(&self.user_data)),
            ("meta-data", Some(&self.meta_data)),
            ("network-config", self.network_config.as_ref()),
        ];
        let files = files
            .into_iter()
            .filter_map(|(name, data)| Some((name, data?)));
        let bytes: u64 = files.clone().map(|(_, data)| data.len() as u64).sum();
        if bytes > MOST_SEED {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        disk.set_len((SIZE + bytes + bytes / 8).next_multiple_of(SIZE))?;
        let options = FormatVolumeOptions::new()
            .volume_label(LABEL)
            .volume_id(0x4c4f_4447);
        fatfs::format_volume(&mut *disk, options)?;
        let system = FileSystem::new(&mut *disk, FsOptions::new())?;
        for (name, data) in files {
            let mut file = system.root_dir().create_file(name)?;
            file.truncate()?;
            file.write_all(data)?;
        }
        system.unmount()?;
        disk.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_disk() {
        let seed = Seed {
            user_data: Seed::user_data(Some("me"), &["ssh-ed25519 A".into()]),
            meta_data: Seed::meta_data(Some("box"), b"x"),
            network_config: Some(vec![b'#'; 3 << 20]),
        };
        let write = || {
            let mut file = tempfile::tempfile().unwrap();
            seed.write(&mut file).unwrap();
            file
        };
        let (one, other) = (write(), write());
        let bytes = |mut file: &File| {
            let mut all = Vec::new();
            io::Seek::rewind(&mut file).unwrap();
            file.read_to_end(&mut all).unwrap();
            all
        };
        assert!(bytes(&one) == bytes(&other));
        io::Seek::rewind(&mut &one).unwrap();
        let system = FileSystem::new(&one, FsOptions::new()).unwrap();
        assert_eq!(system.volume_label_as_bytes(), b"CIDATA");
        let mut read = Vec::new();
        let file = system.root_dir().open_file("network-config");
        file.unwrap().read_to_end(&mut read).unwrap();
        assert_eq!(Some(read), seed.network_config);
    }

    #[test]
    fn users_and_keys() {
        let config = |user, keys: &[&str]| {
            let keys: Vec<String> = keys.iter().map(|key| key.to_string()).collect();
            let text = String::from_utf8(Seed::user_data(user, &keys)).unwrap();
            let text = text.strip_prefix("#cloud-config\n").unwrap();
            serde_json::from_str::<Value>(text).unwrap()
        };
        assert_eq!(config(None, &[]), json!({}));
        assert_eq!(config(None, &["k"]), json!({"ssh_authorized_keys": ["k"]}));
        let user = &config(Some("me"), &["k", "l"])["users"][0];
        assert_eq!(user["name"], "me");
        assert_eq!(user["ssh_authorized_keys"], json!(["k", "l"]));
    }

    #[test]
    fn another_configuration_is_another_instance() {
        let one = Seed::meta_data(Some("a"), b"x");
        assert_eq!(one, Seed::meta_data(Some("a"), b"x"));
        assert_ne!(one, Seed::meta_data(Some("b"), b"x"));
        assert_ne!(one, Seed::meta_data(Some("a"), b"y"));
        assert!(
            String::from_utf8(one)
                .unwrap()
                .contains("\"local-hostname\": \"a\"")
        );
    }
}
