//! Talking to one registry: connection, authentication, redirects, and trying again.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use serde::Deserialize;
use ureq::http::{self, Method, Response, Uri, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, SendBody};

use super::challenge::{Challenge, parse};
use super::{AuthFile, Credentials, MAX_PAUSE, Options, Progress, RegistryError};

/// Redirects that are followed for one request.
const MAX_REDIRECTS: usize = 5;
/// Bytes that are read of an error's text.
const MAX_ERROR_BYTES: u64 = 64 << 10;
/// Bytes in a token service's answer.
const MAX_TOKEN_BYTES: u64 = 1 << 20;
/// The system's authorities, as Debian's `ca-certificates` has them.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
const USER_AGENT: &str = concat!("caisson/", env!("CARGO_PKG_VERSION"));

/// A registry in use.
pub(super) struct Session<'a> {
    pub(super) options: &'a Options,
    pub(super) registry: String,
    /// `https://HOST[:PORT]`, or with `http`.
    pub(super) base: String,
    /// Whether it may speak plain HTTP.
    plain: bool,
    agent: Agent,
    credentials: Option<Credentials>,
    challenge: Mutex<Option<Challenge>>,
    tokens: Mutex<HashMap<String, String>>,
    pub(super) progress: &'a dyn Progress,
}

/// One request.
pub(super) struct Call<'c> {
    pub(super) method: Method,
    pub(super) url: String,
    /// What a token must allow, `repository:NAME:ACTIONS`; several with a space between.
    pub(super) scope: &'c str,
    pub(super) headers: Vec<(&'static str, String)>,
}

/// The content of a request: a fresh reader for each attempt, and its length in bytes.
pub(super) type Content<'c> = &'c (dyn Fn() -> Result<(Box<dyn Read + 'c>, u64), RegistryError> + 'c);

impl<'c> Call<'c> {
    pub(super) fn get(url: impl Into<String>, scope: &'c str) -> Self {
        Self { method: Method::GET, url: url.into(), scope, headers: Vec::new() }
    }

    pub(super) fn method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    pub(super) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

impl<'a> Session<'a> {
    /// Connects: finds out whether the registry speaks TLS, and what authentication it wants.
    pub(super) fn open(
        options: &'a Options,
        registry: &str,
        host: &str,
        repository: &str,
        credentials: Option<Credentials>,
        progress: &'a dyn Progress,
    ) -> Result<Self, RegistryError> {
        let insecure = options.insecure.iter().any(|name| name == registry || name == host);
        let loopback = is_loopback(host);
        let credentials = match credentials {
            Some(credentials) => Some(credentials),
            None => AuthFile::find(&options.auth, registry, repository)?,
        };
        let mut session = Self {
            options,
            registry: registry.to_owned(),
            base: format!("https://{host}"),
            plain: insecure || loopback,
            agent: agent(options, registry, insecure, loopback)?,
            credentials,
            challenge: Mutex::new(None),
            tokens: Mutex::new(HashMap::new()),
            progress,
        };
        match session.ping() {
            // Something else than TLS answers, or nothing does.
            Err(RegistryError::Transport { source, .. } | RegistryError::Certificate { source, .. })
                if session.plain && !matches!(*source, ureq::Error::HostNotFound) =>
            {
                let secure = std::mem::replace(&mut session.base, format!("http://{host}"));
                if let Err(error) = session.ping() {
                    // A certificate that is refused is the better news than a port that speaks no HTTP.
                    session.base = secure;
                    let refused = is_certificate(&source);
                    return Err(if refused { session.transport(&session.base, *source) } else { error });
                }
            }
            other => other?,
        }
        Ok(session)
    }

    /// Asks for the API's root, and notes the challenge.
    fn ping(&self) -> Result<(), RegistryError> {
        let url = format!("{}/v2/", self.base);
        let plain_may_follow = self.plain && self.base.starts_with("https:");
        self.trying(&url, |_| {
            let sent = self.send_once(&Method::GET, &url, &[], None, None);
            let response = match sent {
                // Where plain HTTP may follow, there is nothing to wait for.
                Err(error) if plain_may_follow && error.is_transient() => return Ok(Err(error)),
                other => other?,
            };
            match response.status().as_u16() {
                200..=299 => Ok(Ok(())),
                401 => {
                    self.note_challenge(&url, &response)?;
                    Ok(Ok(()))
                }
                // Some answer so to everything below that they do not know; what is asked for then, tells.
                403 | 404 => Ok(Ok(())),
                _ => Err(self.status(&url, "the registry", response)),
            }
        })?
    }

    /// Sends a request, with whatever is needed so that it is answered: authentication, redirects, and further attempts.
    /// An answer that is no success is an error, but for those in `accepted`.
    pub(super) fn call(
        &self,
        call: &Call<'_>,
        accepted: &[u16],
        what: &str,
        content: Option<Content<'_>>,
    ) -> Result<Response<Body>, RegistryError> {
        self.trying(what, |_| self.call_once(call, accepted, what, content))
    }

    /// A single attempt, for callers that count them.
    pub(super) fn call_part(&self, call: &Call<'_>, what: &str) -> Result<Response<Body>, RegistryError> {
        self.call_once(call, &[], what, None)
    }

    /// A single attempt with content, for callers that count them.
    pub(super) fn call_with(
        &self,
        call: &Call<'_>,
        what: &str,
        content: Content<'_>,
    ) -> Result<Response<Body>, RegistryError> {
        self.call_once(call, &[], what, Some(content))
    }

    /// A request whose answer is a small document: its bytes and headers.
    pub(super) fn fetch(
        &self,
        call: &Call<'_>,
        what: &str,
        limit: u64,
    ) -> Result<(http::HeaderMap, Vec<u8>), RegistryError> {
        self.trying(what, |_| {
            let response = self.call_once(call, &[], what, None)?;
            let (parts, body) = response.into_parts();
            let mut bytes = Vec::new();
            let mut reader = body.into_reader().take(limit.saturating_add(1));
            reader.read_to_end(&mut bytes).map_err(|source| RegistryError::Broken { url: call.url.clone(), source })?;
            if bytes.len() as u64 > limit {
                return Err(RegistryError::Protocol {
                    url: call.url.clone(),
                    reason: format!("{what} is longer than {limit} bytes, the most that is accepted"),
                });
            }
            // A body that ends early without an error of the transport's.
            if let Some(expected) = content_length(&parts.headers)
                && expected != bytes.len() as u64
            {
                let source = std::io::ErrorKind::UnexpectedEof.into();
                return Err(RegistryError::Broken { url: call.url.clone(), source });
            }
            Ok((parts.headers, bytes))
        })
    }

    /// Tries until it succeeds, fails for good, or failed too often.
    pub(super) fn trying<T>(
        &self,
        what: &str,
        mut once: impl FnMut(u32) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let attempts = self.options.attempts.max(1);
        for attempt in 0.. {
            match once(attempt) {
                Err(error) if error.is_transient() => {
                    if attempt + 1 >= attempts {
                        return Err(RegistryError::GivenUp {
                            what: what.to_owned(),
                            attempts,
                            source: Box::new(error),
                        });
                    }
                    self.pause(what, attempt, &error);
                }
                other => return other,
            }
        }
        Err(RegistryError::Stopped)
    }

    /// Waits after a failure, longer each time; as long as the registry asked for, if it did.
    pub(super) fn pause(&self, what: &str, attempt: u32, error: &RegistryError) {
        let pause = self.options.pause.saturating_mul(1 << attempt.min(10));
        let asked = self.asked_for(error).unwrap_or_default();
        let pause = pause.max(asked).min(MAX_PAUSE);
        self.progress.retry(what, pause, error);
        std::thread::sleep(pause);
    }

    fn asked_for(&self, error: &RegistryError) -> Option<Duration> {
        match error {
            RegistryError::Status { detail, .. } => {
                let seconds = detail.strip_prefix(RETRY_AFTER)?.split(' ').next()?;
                seconds.parse().ok().map(Duration::from_secs)
            }
            _ => None,
        }
    }

    fn call_once(
        &self,
        call: &Call<'_>,
        accepted: &[u16],
        what: &str,
        content: Option<Content<'_>>,
    ) -> Result<Response<Body>, RegistryError> {
        let mut renewed = false;
        let mut url = call.url.clone();
        let mut redirects = 0;
        loop {
            let own = same_origin(&url, &self.base);
            let authorization = if own { self.authorization(call.scope)? } else { None };
            let response = match content {
                Some(content) => {
                    let (mut reader, length) = content()?;
                    self.send_once(
                        &call.method,
                        &url,
                        &call.headers,
                        authorization.as_deref(),
                        Some((&mut *reader, length)),
                    )?
                }
                None => self.send_once(&call.method, &url, &call.headers, authorization.as_deref(), None)?,
            };
            let status = response.status().as_u16();
            match status {
                200..=299 => return Ok(response),
                status if accepted.contains(&status) => return Ok(response),
                401 if own && !renewed => {
                    renewed = true;
                    self.note_challenge(&url, &response)?;
                    self.tokens.lock().unwrap_or_else(PoisonError::into_inner).remove(call.scope);
                }
                301 | 302 | 303 | 307 | 308 if matches!(call.method, Method::GET | Method::HEAD) => {
                    let target = location(&url, &response)?;
                    redirects += 1;
                    if redirects > MAX_REDIRECTS {
                        return Err(RegistryError::Redirect { url, target, reason: "there were too many before it" });
                    }
                    if url.starts_with("https:") && !target.starts_with("https:") {
                        return Err(RegistryError::Redirect { url, target, reason: "it would leave TLS" });
                    }
                    url = target;
                }
                _ => return Err(self.status(&url, what, response)),
            }
        }
    }

    fn send_once(
        &self,
        method: &Method,
        url: &str,
        headers: &[(&'static str, String)],
        authorization: Option<&str>,
        content: Option<(&mut dyn Read, u64)>,
    ) -> Result<Response<Body>, RegistryError> {
        let mut request = http::Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        if let Some(authorization) = authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let malformed = |error: http::Error| RegistryError::Protocol { url: url.to_owned(), reason: error.to_string() };
        let sent = match content {
            Some((reader, length)) => {
                let request = request.header(header::CONTENT_LENGTH, length);
                self.agent.run(request.body(SendBody::from_reader(reader)).map_err(malformed)?)
            }
            // ureq tells no length of its own where a POST has nothing to say.
            None if matches!(*method, Method::POST | Method::PUT | Method::PATCH) => {
                self.agent.run(request.body([].as_slice()).map_err(malformed)?)
            }
            None => self.agent.run(request.body(()).map_err(malformed)?),
        };
        sent.map_err(|error| self.transport(url, error))
    }

    fn transport(&self, url: &str, error: ureq::Error) -> RegistryError {
        if is_certificate(&error) {
            return RegistryError::Certificate { registry: self.registry.clone(), source: Box::new(error) };
        }
        RegistryError::Transport { url: without_query(url).to_owned(), source: Box::new(error) }
    }

    fn note_challenge(&self, url: &str, response: &Response<Body>) -> Result<(), RegistryError> {
        let values = response.headers().get_all(header::WWW_AUTHENTICATE);
        let text: Vec<&str> = values.iter().filter_map(|value| value.to_str().ok()).collect();
        match parse(&text.join(", ")) {
            Some(challenge) => {
                *self.challenge.lock().unwrap_or_else(PoisonError::into_inner) = Some(challenge);
                Ok(())
            }
            None => Err(RegistryError::Protocol {
                url: url.to_owned(),
                reason: "it wants an authentication that is neither basic nor a token's".to_owned(),
            }),
        }
    }

    /// The `Authorization` that the registry wants, if it does and we can.
    fn authorization(&self, scope: &str) -> Result<Option<String>, RegistryError> {
        let challenge = self.challenge.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match challenge {
            None => Ok(None),
            Some(Challenge::Basic) => Ok(match &self.credentials {
                Some(Credentials::Password { user, password }) => Some(basic(user, password)),
                _ => None,
            }),
            Some(Challenge::Bearer { realm, service, scope: asked }) => {
                let known = self.tokens.lock().unwrap_or_else(PoisonError::into_inner).get(scope).cloned();
                let token = match known {
                    Some(token) => token,
                    None => {
                        let scopes = if scope.is_empty() { asked.unwrap_or_default() } else { scope.to_owned() };
                        let token = self.trying("a token", |_| self.token(&realm, service.as_deref(), &scopes))?;
                        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
                        tokens.insert(scope.to_owned(), token.clone());
                        token
                    }
                };
                Ok(Some(format!("Bearer {token}")))
            }
        }
    }

    /// Gets a token (distribution's `spec/auth/token.md` and `oauth.md`).
    fn token(&self, realm: &str, service: Option<&str>, scopes: &str) -> Result<String, RegistryError> {
        let refused = |reason: &'static str| RegistryError::Redirect {
            url: self.base.clone(),
            target: realm.chars().take(300).collect(),
            reason,
        };
        let plain = realm.starts_with("http://") && self.base.starts_with("http://");
        if !plain && !realm.starts_with("https://") {
            return Err(refused("a token service has to be reached over TLS"));
        }
        let response = match &self.credentials {
            Some(Credentials::IdentityToken(token)) => {
                let mut form = vec![
                    ("grant_type", "refresh_token".to_owned()),
                    ("refresh_token", token.clone()),
                    ("client_id", "caisson".to_owned()),
                    ("scope", scopes.to_owned()),
                ];
                form.extend(service.map(|service| ("service", service.to_owned())));
                let body: Vec<String> = form.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
                let body = body.join("&");
                let headers = [("content-type", "application/x-www-form-urlencoded".to_owned())];
                let mut reader = body.as_bytes();
                self.send_once(&Method::POST, realm, &headers, None, Some((&mut reader, body.len() as u64)))?
            }
            credentials => {
                let mut query: Vec<String> =
                    service.map(|service| format!("service={}", encode(service))).into_iter().collect();
                query.extend(
                    scopes.split(' ').filter(|scope| !scope.is_empty()).map(|scope| format!("scope={}", encode(scope))),
                );
                let authorization = match credentials {
                    Some(Credentials::Password { user, password }) => {
                        query.push(format!("account={}", encode(user)));
                        Some(basic(user, password))
                    }
                    _ => None,
                };
                let separator = if realm.contains('?') { '&' } else { '?' };
                let url = format!("{realm}{separator}{}", query.join("&"));
                self.send_once(&Method::GET, &url, &[], authorization.as_deref(), None)?
            }
        };
        if !response.status().is_success() {
            return Err(self.status(realm, "a token", response));
        }
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let mut bytes = Vec::new();
        let mut reader = response.into_body().into_reader().take(MAX_TOKEN_BYTES);
        reader.read_to_end(&mut bytes).map_err(|source| RegistryError::Broken { url: realm.to_owned(), source })?;
        let answer: Option<Answer> = serde_json::from_slice(&bytes).ok();
        answer.and_then(|answer| answer.token.or(answer.access_token)).ok_or_else(|| RegistryError::Protocol {
            url: realm.to_owned(),
            reason: "the token service answers without a token".to_owned(),
        })
    }

    /// The error that an answer means.
    pub(super) fn status(&self, url: &str, what: &str, response: Response<Body>) -> RegistryError {
        let status = response.status().as_u16();
        let retry_after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after = retry_after.and_then(|value| value.trim().parse::<u64>().ok());
        let mut bytes = Vec::new();
        let _ = response.into_body().into_reader().take(MAX_ERROR_BYTES).read_to_end(&mut bytes);
        let detail = detail(&bytes);
        let (registry, what) = (self.registry.clone(), what.to_owned());
        match status {
            401 | 403 => RegistryError::Denied { registry, what, detail },
            404 => RegistryError::NotFound { registry, what, detail },
            _ => RegistryError::Status {
                url: without_query(url).to_owned(),
                status,
                detail: match retry_after {
                    Some(seconds) => format!("{RETRY_AFTER}{seconds} s{detail}"),
                    None => detail,
                },
            },
        }
    }
}

const RETRY_AFTER: &str = ", to try again after ";

/// What an error's body says (distribution-spec, "Error Codes"), fit for a terminal.
fn detail(bytes: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(errors) = serde_json::from_slice::<Errors>(bytes) else {
        return String::new();
    };
    match errors.errors.first() {
        Some(One { code, message }) => {
            let text = format!(": {code}: {message}");
            text.chars().filter(|char| !char.is_control()).take(300).collect()
        }
        None => String::new(),
    }
}

/// Where an answer leads to, as a full URL.
pub(super) fn location(url: &str, response: &Response<Body>) -> Result<String, RegistryError> {
    let protocol = |reason: &str| RegistryError::Protocol { url: url.to_owned(), reason: reason.to_owned() };
    let target = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    let target = target.ok_or_else(|| protocol("it names no location"))?;
    let joined = if target.starts_with("http://") || target.starts_with("https://") {
        target.to_owned()
    } else {
        let scheme_end = url.find("://").map_or(0, |at| at + 3);
        let origin_end = url[scheme_end..].find(['/', '?']).map_or(url.len(), |at| scheme_end + at);
        if target.starts_with("//") {
            format!("{}{target}", &url[..scheme_end.saturating_sub(2)])
        } else if target.starts_with('/') {
            format!("{}{target}", &url[..origin_end])
        } else {
            let directory = without_query(url);
            let end = directory.rfind('/').filter(|at| *at >= origin_end).unwrap_or(origin_end);
            format!("{}/{target}", &directory[..end])
        }
    };
    match joined.parse::<Uri>() {
        Ok(uri) if uri.host().is_some() => Ok(joined),
        _ => Err(protocol("it names a malformed location")),
    }
}

/// Whether two URLs have scheme, host and port in common.
pub(super) fn same_origin(one: &str, other: &str) -> bool {
    let origin = |url: &str| {
        let uri: Uri = url.parse().ok()?;
        let scheme = uri.scheme_str()?.to_owned();
        let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        Some((scheme, uri.host()?.to_ascii_lowercase(), port))
    };
    matches!((origin(one), origin(other)), (Some(one), Some(other)) if one == other)
}

/// URLs of storage services have signatures in their queries, which are nobody's business.
fn without_query(url: &str) -> &str {
    url.split('?').next().unwrap_or(url)
}

pub(super) fn content_length(headers: &http::HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

/// Percent-encodes for a query or a form.
pub(super) fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

fn is_loopback(host: &str) -> bool {
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn is_certificate(error: &ureq::Error) -> bool {
    let text = match error {
        ureq::Error::Rustls(error) => error.to_string(),
        // ureq wraps what rustls says while a connection is made.
        ureq::Error::Io(error) => error.to_string(),
        _ => return false,
    };
    text.contains("invalid peer certificate")
}

fn agent(options: &Options, registry: &str, insecure: bool, loopback: bool) -> Result<Agent, RegistryError> {
    let tls = TlsConfig::builder().disable_verification(insecure).root_certs(authorities(options, registry)?).build();
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(USER_AGENT)
        .timeout_connect(Some(options.stall))
        .timeout_per_read(Some(options.stall))
        .timeout_per_write(Some(options.stall))
        .tls_config(tls);
    if loopback {
        config = config.proxy(None);
    }
    Ok(Agent::new_with_config(config.build()))
}

/// The system's authorities (or, without any, those that are built in), and the registry's own.
fn authorities(options: &Options, registry: &str) -> Result<RootCerts, RegistryError> {
    let mut found = Vec::new();
    for directory in &options.certificates {
        let Ok(entries) = std::fs::read_dir(directory.join(registry)) else {
            continue;
        };
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == "crt")) {
            let failed =
                |error: ureq::Error| RegistryError::CertificateFile { path: path.clone(), source: Box::new(error) };
            let bytes = std::fs::read(path).map_err(|error| failed(error.into()))?;
            for item in parse_pem(&bytes) {
                if let PemItem::Certificate(certificate) = item.map_err(failed)? {
                    found.push(certificate);
                }
            }
        }
    }
    match std::fs::read(Path::new(SYSTEM_AUTHORITIES)) {
        Ok(bytes) => {
            found.extend(parse_pem(&bytes).filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            }));
        }
        Err(_) if found.is_empty() => return Ok(RootCerts::WebPki),
        Err(_) => (),
    }
    Ok(RootCerts::new_with_certs(&found))
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
