//! Credentials, where docker and podman keep them: a `config.json`, and the credential helpers that it names.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

/// Bytes in a `config.json` or in a helper's answer.
const MAX_AUTH_BYTES: u64 = 1 << 20;
/// What docker calls its own registry in its files.
const DOCKER_KEY: &str = "https://index.docker.io/v1/";
/// The user name by which helpers mark an identity token.
const TOKEN_USER: &str = "<token>";

/// What opens a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user and a password, or an access token in its place.
    Password {
        /// The user.
        user: String,
        /// The secret.
        password: String,
    },
    /// An OAuth 2 refresh token.
    IdentityToken(String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials(not shown)")
    }
}

/// Why credentials can't be read or stored.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// A file can't be read or written.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is no configuration.
    #[error("{path} is not a configuration as docker writes it: {reason}; mend or remove it")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A credential helper failed.
    #[error("the credential helper {helper} fails to {action} for {registry}: {reason}")]
    Helper {
        /// Its name.
        helper: String,
        /// What it was asked to do.
        action: &'static str,
        /// For which registry.
        registry: String,
        /// Why.
        reason: String,
    },
    /// There is no home directory to keep them in.
    #[error("there is no place for credentials: set HOME, DOCKER_CONFIG or REGISTRY_AUTH_FILE")]
    NoPlace,
}

/// Where credentials are kept.
#[derive(Debug, Clone, Default)]
pub struct AuthFile {
    path: Option<PathBuf>,
}

impl AuthFile {
    /// This file, and no other.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()) }
    }

    /// The files that are read, in order; the first is the one that is written: `REGISTRY_AUTH_FILE`, or docker's own, then
    /// podman's.
    fn paths(&self) -> Vec<PathBuf> {
        if let Some(path) = &self.path {
            return vec![path.clone()];
        }
        let from = |name: &str, rest: &str| {
            let value = std::env::var_os(name).filter(|value| !value.is_empty());
            value.map(|value| if rest.is_empty() { PathBuf::from(value) } else { Path::new(&value).join(rest) })
        };
        if let Some(path) = from("REGISTRY_AUTH_FILE", "") {
            return vec![path];
        }
        let docker = from("DOCKER_CONFIG", "config.json").or_else(|| from("HOME", ".docker/config.json"));
        let podman = from("XDG_RUNTIME_DIR", "containers/auth.json");
        docker.into_iter().chain(podman).collect()
    }

    /// The credentials for a registry (and a repository in it: podman's files may have one apart), if there are any.
    ///
    /// # Errors
    /// A file is malformed, or a helper fails.
    pub fn find(&self, registry: &str, repository: &str) -> Result<Option<Credentials>, AuthError> {
        for path in self.paths() {
            let Some(config) = read(&path)? else {
                continue;
            };
            let keys = keys(registry, repository);
            let helper =
                config["credHelpers"][registry].as_str().or_else(|| config["credHelpers"][server(registry)].as_str());
            if let Some(helper) = helper.or_else(|| config["credsStore"].as_str())
                && let Some(found) = ask_helper(helper, server(registry))?
            {
                return Ok(Some(found));
            }
            for key in keys {
                if let Some(found) = entry(&config["auths"][&key], &path)? {
                    return Ok(Some(found));
                }
            }
        }
        Ok(None)
    }

    /// Keeps credentials, in the helper that the file names for this registry, or else in the file. Tells where.
    ///
    /// # Errors
    /// The file or helper can't be used.
    pub fn store(&self, registry: &str, credentials: &Credentials) -> Result<String, AuthError> {
        let path = self.paths().into_iter().next().ok_or(AuthError::NoPlace)?;
        let mut config = read(&path)?.unwrap_or_else(|| json!({}));
        let (user, secret) = match credentials {
            Credentials::Password { user, password } => (user.as_str(), password.as_str()),
            Credentials::IdentityToken(token) => (TOKEN_USER, token.as_str()),
        };
        if let Some(helper) = helper_of(&config, registry) {
            let input = json!({ "ServerURL": server(registry), "Username": user, "Secret": secret }).to_string();
            run_helper(&helper, "store", server(registry), &input)?;
            return Ok(format!("docker-credential-{helper}"));
        }
        let value = match credentials {
            Credentials::Password { user, password } => json!({ "auth": BASE64.encode(format!("{user}:{password}")) }),
            Credentials::IdentityToken(token) => json!({ "auth": "", "identitytoken": token }),
        };
        if !config["auths"].is_object() {
            config["auths"] = json!({});
        }
        config["auths"][server(registry)] = value;
        write(&path, &config)?;
        Ok(path.display().to_string())
    }

    /// Forgets a registry's credentials. Tells whether there were any.
    ///
    /// # Errors
    /// The file or helper can't be used.
    pub fn erase(&self, registry: &str) -> Result<bool, AuthError> {
        let mut erased = false;
        for path in self.paths() {
            let Some(mut config) = read(&path)? else {
                continue;
            };
            if let Some(helper) = helper_of(&config, registry)
                && ask_helper(&helper, server(registry))?.is_some()
            {
                run_helper(&helper, "erase", server(registry), server(registry))?;
                erased = true;
            }
            if let Some(auths) = config["auths"].as_object_mut() {
                let before = auths.len();
                for key in keys(registry, "") {
                    auths.remove(&key);
                }
                if auths.len() != before {
                    erased = true;
                    write(&path, &config)?;
                }
            }
        }
        Ok(erased)
    }
}

fn server(registry: &str) -> &str {
    if registry == "docker.io" { DOCKER_KEY } else { registry }
}

/// The keys that a registry may have, the most special first.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = repository;
    while !path.is_empty() {
        keys.push(format!("{registry}/{path}"));
        path = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
    keys.push(server(registry).to_owned());
    keys.push(registry.to_owned());
    for (scheme, suffix) in
        [("https://", ""), ("http://", ""), ("https://", "/"), ("https://", "/v1/"), ("https://", "/v2/")]
    {
        keys.push(format!("{scheme}{registry}{suffix}"));
    }
    keys
}

fn read(path: &Path) -> Result<Option<Value>, AuthError> {
    let failed = |source| AuthError::Io { action: "read", path: path.to_owned(), source };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_AUTH_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    let malformed = |reason: String| AuthError::Malformed { path: path.to_owned(), reason };
    if bytes.len() as u64 > MAX_AUTH_BYTES {
        return Err(malformed(format!("it is longer than {MAX_AUTH_BYTES} bytes")));
    }
    if bytes.trim_ascii().is_empty() {
        return Ok(None);
    }
    // serde's message could quote a secret; its place does not.
    let config: Value = serde_json::from_slice(&bytes)
        .map_err(|error| malformed(format!("no JSON at line {}, column {}", error.line(), error.column())))?;
    if config.is_object() { Ok(Some(config)) } else { Err(malformed("it is no JSON object".to_owned())) }
}

/// Writes the file anew, readable by its owner alone from the beginning.
fn write(path: &Path, config: &Value) -> Result<(), AuthError> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let failed = |source| AuthError::Io { action: "write", path: path.clone(), source };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    let text = format!("{config:#}\n");
    let written = || -> io::Result<()> {
        let _ = fs::remove_file(&temporary);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    };
    written().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        failed(source)
    })
}

fn entry(value: &Value, path: &Path) -> Result<Option<Credentials>, AuthError> {
    if let Some(token) = value["identitytoken"].as_str().filter(|token| !token.is_empty()) {
        return Ok(Some(Credentials::IdentityToken(token.to_owned())));
    }
    let Some(auth) = value["auth"].as_str().filter(|auth| !auth.is_empty()) else {
        return Ok(None);
    };
    let decoded = BASE64.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    match decoded.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':')) {
        Some((user, password)) => {
            Ok(Some(Credentials::Password { user: user.to_owned(), password: password.to_owned() }))
        }
        None => Err(AuthError::Malformed {
            path: path.to_owned(),
            reason: "an \"auth\" in it is not the base64 of USER:PASSWORD".to_owned(),
        }),
    }
}

fn helper_of(config: &Value, registry: &str) -> Option<String> {
    let own = config["credHelpers"][registry].as_str().or_else(|| config["credHelpers"][server(registry)].as_str());
    own.or_else(|| config["credsStore"].as_str()).map(str::to_owned).filter(|helper| !helper.is_empty())
}

fn ask_helper(helper: &str, registry: &str) -> Result<Option<Credentials>, AuthError> {
    let answer = match run_helper(helper, "get", registry, registry) {
        Ok(answer) => answer,
        // The protocol has no better sign than this text.
        Err(AuthError::Helper { reason, .. }) if reason.contains("credentials not found") => return Ok(None),
        Err(error) => return Err(error),
    };
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    match (answer["Username"].as_str(), answer["Secret"].as_str()) {
        (Some(TOKEN_USER), Some(token)) => Ok(Some(Credentials::IdentityToken(token.to_owned()))),
        (Some(user), Some(password)) => {
            Ok(Some(Credentials::Password { user: user.to_owned(), password: password.to_owned() }))
        }
        _ => Err(AuthError::Helper {
            helper: helper.to_owned(),
            action: "get",
            registry: registry.to_owned(),
            reason: "its answer has no Username and Secret".to_owned(),
        }),
    }
}

fn run_helper(helper: &str, action: &'static str, registry: &str, input: &str) -> Result<Vec<u8>, AuthError> {
    let failed =
        |reason: String| AuthError::Helper { helper: helper.to_owned(), action, registry: registry.to_owned(), reason };
    if !helper.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')) {
        return Err(failed("this is no name of a helper".to_owned()));
    }
    let program = format!("docker-credential-{helper}");
    let mut child = Command::new(&program)
        .arg(action)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|error| failed(format!("{program} can't be run: {error}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read says by its exit status what it thinks.
        let _ = stdin.write_all(input.as_bytes());
    }
    let mut answer = Vec::new();
    let read = child.stdout.take().map(|stdout| stdout.take(MAX_AUTH_BYTES).read_to_end(&mut answer));
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    if let Some(Err(error)) = read {
        return Err(failed(error.to_string()));
    }
    if !status.success() {
        let said: String = String::from_utf8_lossy(&answer).trim().chars().take(300).collect();
        return Err(failed(if said.is_empty() { status.to_string() } else { said }));
    }
    Ok(answer)
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;
