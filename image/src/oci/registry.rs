//! A registry of images: what one asks of it, over HTTP.
//!
//! See the OCI Distribution Specification 1.1 (which is Docker's registry API v2), and
//! the token authentication of Docker's registry. Registries on the host itself
//! (127.0.0.0/8, `localhost`) are spoken to without TLS, as other tools do it.

use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use oci_spec::distribution::Reference;
use oci_spec::image::Descriptor;
use serde::Deserialize;
use ureq::config::{AutoHeaderValue, RedirectAuthHeaders};
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::credentials::Login;

/// Docker's own registry, and where it really is.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// Media types of manifests and lists of them.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// Bytes of a manifest, a token or an error message.
const MOST_TEXT: u64 = 8 << 20;

/// How long a registry may take to do anything.
const PATIENCE: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(20);

/// One repository of a registry.
pub(crate) struct Registry {
    agent: Agent,
    /// `docker.io`, as users call it.
    name: String,
    /// `https://HOST/v2/REPOSITORY/`
    url: String,
    login: Option<Login>,
    /// The `Authorization` header that the registry takes.
    authorization: Option<String>,
}

/// What a registry wants to know before it answers.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    /// A token, from this place with these parameters.
    Bearer {
        realm: String,
        parameters: Vec<(String, String)>,
    },
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// How registries tell what is wrong.
#[derive(Deserialize)]
struct Errors {
    errors: Vec<ErrorInfo>,
}

#[derive(Deserialize)]
struct ErrorInfo {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Registry {
    pub(crate) fn new(reference: &Reference, login: Option<Login>) -> Registry {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .accept_encoding(AutoHeaderValue::None)
            .user_agent(concat!("lodger/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .build();
        let name = reference.registry();
        let host = match name {
            DOCKER_HUB => DOCKER_HUB_HOST,
            other => other,
        };
        let scheme = if is_local(host) { "http" } else { "https" };
        Registry {
            agent: agent.into(),
            name: name.to_owned(),
            url: format!("{scheme}://{host}/v2/{}/", reference.repository()),
            login,
            authorization: None,
        }
    }

    /// The manifest, or the list of manifests, with this tag or digest.
    pub(crate) fn manifest(&mut self, which: &str) -> Result<Vec<u8>, String> {
        let mut answer = self.get(&format!("manifests/{which}"), &[("Accept", MANIFESTS)])?;
        match answer.status() {
            StatusCode::OK => text(&mut answer).map_err(|error| self.broken(&error)),
            StatusCode::NOT_FOUND => Err(format!("{} has no such image", self.name)),
            _ => Err(self.refusal(answer)),
        }
    }

    /// The bytes of a blob from `start` on, and where they really start: a registry may
    /// send it from the beginning.
    pub(crate) fn blob(
        &mut self,
        blob: &Descriptor,
        start: u64,
    ) -> Result<(u64, impl Read + use<>), String> {
        let range = format!("bytes={start}-");
        let headers: &[(&str, &str)] = match start {
            0 => &[],
            _ => &[("Range", &range)],
        };
        let answer = self.get(&format!("blobs/{}", blob.digest()), headers)?;
        let begins = |answer: &Response<Body>| {
            let range = answer.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
            let range = range.strip_prefix("bytes ")?;
            range.split('-').next()?.parse::<u64>().ok()
        };
        let start = match answer.status() {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT if begins(&answer) == Some(start) => start,
            // What is here is not the beginning of what is there.
            StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT if start > 0 => {
                drop(answer);
                let answer = self.get(&format!("blobs/{}", blob.digest()), &[])?;
                return match answer.status() {
                    StatusCode::OK => Ok((0, reader(answer))),
                    _ => Err(self.refusal(answer)),
                };
            }
            StatusCode::NOT_FOUND => {
                return Err(format!("{} lacks {}", self.name, blob.digest()));
            }
            _ => return Err(self.refusal(answer)),
        };
        Ok((start, reader(answer)))
    }

    /// Asks, and says who asks if that is wanted.
    fn get(&mut self, path: &str, headers: &[(&str, &str)]) -> Result<Response<Body>, String> {
        let url = format!("{}{path}", self.url);
        let mut answer = self.send(&url, headers)?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            let challenges = answer.headers().get_all(header::WWW_AUTHENTICATE);
            let challenge = challenges
                .iter()
                .filter_map(|value| Challenge::parse(value.to_str().ok()?))
                .next();
            if let Some(challenge) = challenge {
                drop(answer);
                self.authorization = self.authorize(challenge)?;
                answer = self.send(&url, headers)?;
            }
        }
        Ok(answer)
    }

    fn send(&self, url: &str, headers: &[(&str, &str)]) -> Result<Response<Body>, String> {
        let mut request = self.agent.get(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(value) = &self.authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        request.call().map_err(|error| self.unreachable(&error))
    }

    /// The `Authorization` header that meets the challenge; `None`: there is nothing to say.
    fn authorize(&self, challenge: Challenge) -> Result<Option<String>, String> {
        let basic = self.login.as_ref().and_then(|login| match login {
            Login::Password { user, password } => {
                let pair = BASE64.encode(format!("{user}:{password}"));
                Some(format!("Basic {pair}"))
            }
            Login::Token(_) => None,
        });
        let (realm, parameters) = match challenge {
            Challenge::Basic => return Ok(basic),
            Challenge::Bearer { realm, parameters } => (realm, parameters),
        };
        if !realm.starts_with("https://") && !self.url.starts_with("http://") {
            return Err(format!(
                "{} sends passwords to {realm}, which is not encrypted",
                self.name
            ));
        }
        let answer = match &self.login {
            Some(Login::Token(token)) => {
                let form = [
                    ("grant_type", "refresh_token"),
                    ("client_id", "lodger"),
                    ("refresh_token", token),
                ];
                let parameters = parameters.iter().map(|(k, v)| (k.as_str(), v.as_str()));
                let form = form.into_iter().chain(parameters);
                self.agent.post(&realm).send_form(form)
            }
            _ => {
                let mut request = self.agent.get(&realm);
                for (key, value) in parameters {
                    request = request.query(key, value);
                }
                if let Some(basic) = basic {
                    request = request.header(header::AUTHORIZATION, basic);
                }
                request.call()
            }
        };
        let mut answer = answer.map_err(|error| self.unreachable(&error))?;
        if answer.status() != StatusCode::OK {
            return Err(self.refusal(answer));
        }
        let body = text(&mut answer).map_err(|error| self.broken(&error))?;
        let token: Token = serde_json::from_slice(&body).map_err(|error| self.broken(&error))?;
        let token = token.token.or(token.access_token);
        Ok(token.map(|token| format!("Bearer {token}")))
    }

    fn unreachable(&self, error: &ureq::Error) -> String {
        format!("cannot reach {}: {error}", self.name)
    }

    fn broken(&self, error: &dyn std::fmt::Display) -> String {
        format!("{} does not answer as a registry does: {error}", self.name)
    }

    /// What an answer that is none tells.
    fn refusal(&self, mut answer: Response<Body>) -> String {
        let said = text(&mut answer).unwrap_or_default();
        let said = serde_json::from_slice::<Errors>(&said).unwrap_or(Errors { errors: vec![] });
        let said = said.errors.first().map(|error| match &error.message {
            message if message.is_empty() => format!(" ({})", error.code),
            message => format!(" ({message})"),
        });
        // It goes to somebody's terminal.
        let said = said.unwrap_or_default().replace(char::is_control, " ");
        match answer.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.login.is_some() => format!(
                "{} refuses access{said}: the login that is stored for it does not do, or there is no such image",
                self.name
            ),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => format!(
                "{0} refuses access{said}: there is no such image, or it takes a login, as \
                 `docker login {0}` or `podman login {0}` stores it",
                self.name
            ),
            StatusCode::TOO_MANY_REQUESTS => {
                format!("{} has had too many requests from here{said}", self.name)
            }
            status => format!("{} answers {status}{said}", self.name),
        }
    }
}

impl Challenge {
    /// Reads a `WWW-Authenticate` header (RFC 9110, 11.6.1) with one challenge.
    fn parse(header: &str) -> Option<Challenge> {
        let (scheme, mut rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Challenge::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut realm = None;
        let mut parameters = Vec::new();
        while let Some((key, value)) = rest.split_once('=') {
            let key = key.trim_matches([' ', ',']);
            let (value, after) = match value.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => value.split_once(',').unwrap_or((value, "")),
            };
            match key {
                "realm" => realm = Some(value.to_owned()),
                "service" | "scope" => parameters.push((key.to_owned(), value.to_owned())),
                _ => {}
            }
            rest = after;
        }
        Some(Challenge::Bearer {
            realm: realm?,
            parameters,
        })
    }
}

fn text(answer: &mut Response<Body>) -> io::Result<Vec<u8>> {
    let body = answer.body_mut().with_config().limit(MOST_TEXT);
    body.read_to_vec().map_err(ureq::Error::into_io)
}

fn reader(answer: Response<Body>) -> impl Read {
    let body = answer.into_body().into_with_config();
    body.limit(u64::MAX).reader()
}

/// Whether the host is this one.
fn is_local(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    name == "localhost" || (name.parse::<Ipv4Addr>()).is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    use super::*;

    #[test]
    fn challenges() {
        let bearer = |realm: &str, parameters: &[(&str, &str)]| {
            let own = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
            Some(Challenge::Bearer {
                realm: realm.into(),
                parameters: parameters.iter().map(own).collect(),
            })
        };
        for (header, expected) in [
            ("Basic realm=\"x\"", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            (
                "Bearer realm=\"https://a/token\",service=\"r\",scope=\"repository:b:pull,push\",error=\"e\"",
                bearer(
                    "https://a/token",
                    &[("service", "r"), ("scope", "repository:b:pull,push")],
                ),
            ),
            (
                "bearer realm=https://a, service=r",
                bearer("https://a", &[("service", "r")]),
            ),
            ("Bearer service=\"r\"", None),
            ("Bearer realm=\"half", None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(Challenge::parse(header), expected, "{header}");
        }
    }

    /// Answers requests as `answer` says, from the request's head and body; what it was asked.
    fn serve(answer: impl Fn(&str) -> String + Send + 'static) -> (String, Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (send, asked) = channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let (mut request, mut len) = (String::new(), 0);
                while !request.ends_with("\r\n\r\n") && stream.read_line(&mut request).unwrap() > 0
                {
                    let line = request
                        .lines()
                        .next_back()
                        .unwrap_or_default()
                        .to_lowercase();
                    if let Some(n) = line.strip_prefix("content-length: ") {
                        len = n.parse().unwrap();
                    }
                }
                let mut body = vec![0; len];
                stream.read_exact(&mut body).unwrap();
                request += &String::from_utf8(body).unwrap();
                let answer = format!("HTTP/1.1 {}", answer(&request));
                stream.into_inner().write_all(answer.as_bytes()).unwrap();
                if send.send(request).is_err() {
                    break;
                }
            }
        });
        (address, asked)
    }

    fn http(status: &str, header: &str, body: &str) -> String {
        let len = body.len();
        format!("{status}\r\nConnection: close\r\n{header}Content-Length: {len}\r\n\r\n{body}")
    }

    /// A registry that takes the token `T`, which its other half gives; and what both were asked.
    fn with_token(login: Option<Login>) -> (Result<Vec<u8>, String>, Vec<String>) {
        let (tokens, token_asked) = serve(|_| http("200 OK", "", r#"{"access_token": "T"}"#));
        let (address, asked) = serve(move |request| {
            match request
                .to_lowercase()
                .contains("authorization: bearer t\r\n")
            {
                true => http("200 OK", "", "manifest"),
                false => {
                    let challenge = format!(
                        "WWW-Authenticate: Bearer realm=\"http://{tokens}/token\",service=\"s\",scope=\"repository:a/b:pull\"\r\n"
                    );
                    http("401 Unauthorized", &challenge, "")
                }
            }
        });
        let reference = format!("{address}/a/b").parse().unwrap();
        let manifest = Registry::new(&reference, login).manifest("latest");
        (
            manifest,
            asked.try_iter().chain(token_asked.try_iter()).collect(),
        )
    }

    #[test]
    fn tokens_are_fetched_and_shown() {
        let password = Login::Password {
            user: "me".into(),
            password: "secret".into(),
        };
        for (login, method, part) in [
            (None, "GET /token?", "scope=repository"),
            (Some(password), "GET /token?", "Basic bWU6c2VjcmV0"),
            (
                Some(Login::Token("R".into())),
                "POST /token",
                "refresh_token=R",
            ),
        ] {
            let (manifest, asked) = with_token(login);
            assert_eq!(manifest.as_deref(), Ok(&b"manifest"[..]));
            let asked = asked.concat();
            assert!(asked.contains(method) && asked.contains(part), "{asked}");
            assert!(asked.contains("GET /v2/a/b/manifests/latest"), "{asked}");
        }
    }

    #[test]
    fn a_refusal_is_told_without_control_characters() {
        let (address, _asked) = serve(|_| {
            let body = "{\"errors\": [{\"code\": \"X\", \"message\": \"no\\u001b[2J way\"}]}";
            http("403 Forbidden", "", body)
        });
        let reference = format!("{address}/a/b").parse().unwrap();
        let problem = Registry::new(&reference, None).manifest("1").unwrap_err();
        assert!(problem.contains("(no [2J way)"), "{problem:?}");
    }

    #[test]
    fn registries_of_the_host_itself() {
        for (host, expected) in [
            ("localhost", true),
            ("localhost:5000", true),
            ("127.0.0.1:5000", true),
            ("127.9.9.9", true),
            ("docker.io", false),
            ("localhost.example.org", false),
            ("128.0.0.1:5000", false),
        ] {
            assert_eq!(is_local(host), expected, "{host}");
        }
    }
}
