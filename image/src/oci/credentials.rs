//! Logins for registries, as `docker login` and `podman login` store them.
//!
//! Read are `$REGISTRY_AUTH_FILE`, `$XDG_RUNTIME_DIR/containers/auth.json`,
//! `~/.config/containers/auth.json` and `$DOCKER_CONFIG/config.json` (else
//! `~/.docker/config.json`), in this order; see containers-auth.json(5). A helper
//! program `docker-credential-NAME` is asked where a file says so.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use oci_spec::distribution::Reference;
use serde::Deserialize;

/// The key of Docker's own registry in Docker's file.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// Who pulls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Login {
    /// With a password.
    Password { user: String, password: String },
    /// With a token that is exchanged for others.
    Token(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Config {
    auths: HashMap<String, Auth>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Auth {
    /// `USER:PASSWORD` in Base64.
    auth: String,
    identitytoken: String,
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// The login for the image, if one is stored. `Err` names the file or the helper that cannot be used.
pub(crate) fn find(reference: &Reference) -> Result<Option<Login>, String> {
    for path in files(|name| std::env::var_os(name).map(PathBuf::from)) {
        if let Some(login) = in_file(&path, reference)? {
            return Ok(Some(login));
        }
    }
    Ok(None)
}

/// Where logins may be, in the order in which they count.
fn files(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let home = |below: &str| variable("HOME").map(|home| home.join(below));
    let config = variable("XDG_CONFIG_HOME").or_else(|| home(".config"));
    let docker = variable("DOCKER_CONFIG").or_else(|| home(".docker"));
    [
        variable("REGISTRY_AUTH_FILE"),
        variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
        config.map(|dir| dir.join("containers/auth.json")),
        docker.map(|dir| dir.join("config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn in_file(path: &Path, reference: &Reference) -> Result<Option<Login>, String> {
    let wrong = |what: String| format!("{}: {what}", path.display());
    let Ok(text) = fs::read(path) else {
        return Ok(None);
    };
    let config: Config = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let (registry, keys) = keys(reference);
    let stored = keys.iter().find_map(|key| config.auths.get(key));
    if let Some(auth) = stored {
        if !auth.identitytoken.is_empty() {
            return Ok(Some(Login::Token(auth.identitytoken.clone())));
        }
        if !auth.auth.is_empty() {
            let pair = BASE64.decode(auth.auth.trim());
            let pair = pair.ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = pair.as_deref().and_then(|pair| pair.split_once(':'));
            let (user, password) =
                pair.ok_or_else(|| wrong(format!("the login for {registry} is damaged")))?;
            return Ok(Some(Login::Password {
                user: user.to_owned(),
                password: password.trim_end_matches('\0').to_owned(),
            }));
        }
    }
    let named = keys.iter().find_map(|key| config.cred_helpers.get(key));
    match named.or(config.creds_store.as_ref()) {
        Some(helper) => ask(helper, &registry).map_err(wrong),
        None => Ok(None),
    }
}

/// How helpers call the registry; and what a login for the image may be stored under, the closest first.
fn keys(reference: &Reference) -> (String, Vec<String>) {
    let registry = reference.registry();
    let mut keys = Vec::new();
    let mut name = format!("{registry}/{}", reference.repository());
    loop {
        keys.push(name.clone());
        match name.rfind('/') {
            Some(at) => name.truncate(at),
            None => break,
        }
    }
    for scheme in ["https://", "http://"] {
        keys.push(format!("{scheme}{registry}"));
        keys.push(format!("{scheme}{registry}/"));
    }
    if registry == "docker.io" {
        keys.push(DOCKER_HUB_KEY.into());
        return (DOCKER_HUB_KEY.into(), keys);
    }
    (registry.to_owned(), keys)
}

/// Asks a helper program; see docker-credential-helpers.
fn ask(helper: &str, registry: &str) -> Result<Option<Login>, String> {
    let program = format!("docker-credential-{helper}");
    let failed = |error: std::io::Error| format!("cannot run {program}: {error}");
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read says so by its status.
        let _ = stdin.write_all(registry.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        // It has no login for this registry.
        return Ok(None);
    }
    let answer: Answer = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("{program} does not answer as such programs do: {error}"))?;
    Ok(Some(match answer.username.as_str() {
        "<token>" => Login::Token(answer.secret),
        _ => Login::Password {
            user: answer.username,
            password: answer.secret,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(config: &str, reference: &str) -> Result<Option<Login>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), config).unwrap();
        in_file(file.path(), &reference.parse().unwrap())
    }

    #[test]
    fn stored_logins() {
        let password = |user: &str, password: &str| {
            Some(Login::Password {
                user: user.into(),
                password: password.into(),
            })
        };
        // "u:p:x", "me:secret"
        let file = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "dTpwOng="},
            "quay.io": {"auth": "dTpwOng="}, "quay.io/team": {"auth": "bWU6c2VjcmV0"},
            "127.0.0.1:5000": {"identitytoken": "abc"}, "empty.org": {}}, "HttpHeaders": {"a": "b"}}"#;
        for (reference, expected) in [
            ("nginx", password("u", "p:x")),
            ("quay.io/other/x:1", password("u", "p:x")),
            ("quay.io/team/x:1", password("me", "secret")),
            ("127.0.0.1:5000/x", Some(Login::Token("abc".into()))),
            ("empty.org/x", None),
            ("ghcr.io/x/y", None),
        ] {
            assert_eq!(login(file, reference), Ok(expected), "{reference}");
        }
        assert_eq!(login("{}", "nginx"), Ok(None));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (file, expected) in [
            ("{", "EOF"),
            (r#"{"auths": {"docker.io": {"auth": "!"}}}"#, "docker.io"),
            (
                r#"{"credsStore": "no-such-helper"}"#,
                "docker-credential-no-such-helper",
            ),
        ] {
            let error = login(file, "nginx").unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn files_in_their_order() {
        let all = files(|name| Some(format!("/{name}").into()));
        let all: Vec<_> = all.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(
            all,
            [
                "/REGISTRY_AUTH_FILE",
                "/XDG_RUNTIME_DIR/containers/auth.json",
                "/XDG_CONFIG_HOME/containers/auth.json",
                "/DOCKER_CONFIG/config.json"
            ]
        );
        let home = files(|name| (name == "HOME").then(|| "/h".into()));
        let home: Vec<_> = home.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(
            home,
            ["/h/.config/containers/auth.json", "/h/.docker/config.json"]
        );
    }
}
