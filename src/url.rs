//! Database URLs: what they name, the form the driver gets, and the form that may be shown.
//!
//! A URL is checked here before a driver sees it, because libpq quotes what it cannot parse, password included.

use std::path::{Path, PathBuf};

use crate::kind::DatabaseKind;
use crate::percent::{decode as percent_decode, encode as percent_encode};
use crate::redact::{MASK, Redactor, is_harmless};
use crate::wording::{phrase, visible};

/// Parameters whose values say where the database is.
const NAMES: &[&str] = &["host", "hostaddr", "port", "user", "dbname", "unix_socket"];

/// Whether a parameter may be a misspelt `password`, or a piece of one.
fn is_unknown(name: &str) -> bool {
    !is_harmless(name) && !name.contains("password")
}

/// A URL that was understood.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) kind: DatabaseKind,
    /// Which server: everything in the URL that determines where the driver connects.
    pub(crate) server: String,
    /// The server and database for messages, without credentials.
    pub(crate) shown: String,
    /// The database's own name; for SQLite its path.
    pub(crate) database: String,
    /// What the driver gets, before options are added.
    pub(crate) url: String,
    redactor: Redactor,
    /// SQLite in memory.
    pub(crate) in_memory: bool,
    /// A SQLite file that the URL opens for reading only.
    pub(crate) read_only: bool,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown)
    }
}

impl Target {
    /// Reads `url`. `kind` is the database of the connection type, where that says it.
    ///
    /// The error is a reason that quotes nothing of the URL but its scheme.
    pub(crate) fn parse(url: &str, kind: Option<DatabaseKind>) -> Result<Self, String> {
        if url.is_empty() {
            return Err("the database URL is empty".into());
        }
        if url.contains('\0') {
            return Err("the database URL contains a NUL character".into());
        }
        if url.starts_with("mariadb:") && kind.is_none_or(|kind| kind == DatabaseKind::Mysql) {
            let form = DatabaseKind::Mysql.url_form();
            return Err(format!(
                "the database URL starts with `mariadb:`; that of a MariaDB server is written {form} too"
            ));
        }
        let by_url = DatabaseKind::of_url(url);
        let kind = match (kind, by_url) {
            (Some(kind), Some(found)) if kind != found => {
                return Err(format!(
                    "the database URL is one for {}, but the connection type is for {}",
                    found.name(),
                    kind.name()
                ));
            }
            (Some(kind), _) | (None, Some(kind)) => kind,
            (None, None) => {
                return Err(
                    "the database URL has no scheme that is known; it starts with postgres://, mysql://, sqlite:// or \
                            file:, is `:memory:` or is a path that ends in .sqlite, .sqlite3 or .db"
                        .into(),
                );
            }
        };
        match kind {
            DatabaseKind::Postgres if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
                Self::server(url, kind)
            }
            DatabaseKind::Postgres => Self::keywords(url),
            DatabaseKind::Mysql => Self::server(url, kind),
            DatabaseKind::Sqlite => Self::file(url),
        }
    }

    /// `text` on one line, with the passwords redacted.
    pub(crate) fn redact(&self, text: &str) -> String {
        // First, as a password may contain white space.
        phrase(self.redactor.redact(text))
    }

    /// `url` with parameters added, in its own syntax.
    pub(crate) fn with_parameters(&self, parameters: &[(&str, String)]) -> String {
        let mut url = self.url.clone();
        let as_url = is_url(&url);
        for (name, value) in parameters {
            if as_url {
                match url.contains('?') {
                    true if url.ends_with(['?', '&']) => {}
                    true => url.push('&'),
                    false => url.push('?'),
                }
                url.push_str(&format!("{name}={}", percent_encode(value)));
            } else {
                url.push_str(&format!(" {name}='{}'", value.replace('\\', "\\\\").replace('\'', "\\'")));
            }
        }
        url
    }

    /// Whether the URL itself sets a parameter.
    pub(crate) fn sets(&self, parameter: &str) -> bool {
        self.address().1.iter().any(|(name, _)| name == parameter)
    }

    fn server(url: &str, kind: DatabaseKind) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").ok_or_else(|| malformed(kind, "it has no `://`"))?;
        if kind == DatabaseKind::Mysql && scheme != "mysql" {
            return Err(malformed(kind, "it does not start with `mysql://`"));
        }
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, tail) = rest.split_at(end);
        let (credentials, hosts) = match authority.split_once('@') {
            Some((_, hosts)) if hosts.contains('@') => {
                return Err(malformed(
                    kind,
                    "there is more than one `@` before the host: write `%40` in user and password",
                ));
            }
            Some((credentials, hosts)) => (credentials, hosts),
            None => ("", authority),
        };
        if rest.contains('#') {
            return Err(malformed(kind, "it contains a `#`: write `%23`"));
        }
        let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
        // Without a path libpq takes an `@` in the parameters for the end of the credentials.
        if path.contains('@') || path.is_empty() && !authority.contains('@') && query.contains('@') {
            return Err(malformed(
                kind,
                "there is a `/` or `?` before the `@`: write `%2F` and `%3F` in user and password",
            ));
        }
        if url.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(malformed(kind, "it contains white space: write `%20`"));
        }
        let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
        let user = percent_decode(user).ok_or_else(|| malformed(kind, "the user is not valid percent-encoding"))?;
        let password = percent_decode(password)
            .ok_or_else(|| malformed(kind, "the password is not valid percent-encoding (`%` itself is `%25`)"))?;
        for host in hosts.split(',') {
            let (name, port) = match host.rsplit_once(':') {
                Some((name, _)) if name.starts_with('[') && !name.ends_with(']') => (host, ""),
                Some(both) => both,
                None => (host, ""),
            };
            let usual = |c: char| c.is_alphanumeric() || "-._%~".contains(c);
            let is_address = name.starts_with('[') && name.find(']') == Some(name.len() - 1);
            let is_name = is_address || name.chars().all(usual) && percent_decode(name).is_some();
            if !is_name || !port.is_empty() && port.parse::<u16>().is_err() {
                return Err(malformed(
                    kind,
                    "the host is no name or address, or the port is not a number from 0 to 65535 (a `:` or `@` of the \
                     password is percent-encoded)",
                ));
            }
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, _) = pair.split_once('=').ok_or_else(|| malformed(kind, "a parameter after `?` has no `=`"))?;
            percent_decode(pair)
                .ok_or_else(|| malformed(kind, "a parameter after `?` is not valid percent-encoding"))?;
            if pair.contains('@') && (is_unknown(name) || name.contains('@')) {
                let reason = "there is a `?` before an `@`: write `%3F` in user and password, and `%40` in parameters";
                return Err(malformed(kind, reason));
            }
        }
        let database = percent_decode(path.trim_start_matches('/'))
            .ok_or_else(|| malformed(kind, "the database name is not valid percent-encoding"))?;
        if kind == DatabaseKind::Mysql && database.contains('/') {
            return Err(malformed(kind, "the database name contains a `/`"));
        }
        let place =
            match query.split('&').find_map(|pair| pair.strip_prefix("host=").or(pair.strip_prefix("unix_socket="))) {
                Some(socket) => percent_decode(socket).unwrap_or_default(),
                None => percent_decode(hosts).unwrap_or_default(),
            };
        // Whatever else determines where libpq connects.
        let place = ["hostaddr", "service"].iter().fold(place, |place, name| {
            let value = |pair: &str| pair.strip_prefix(name)?.strip_prefix('=').and_then(percent_decode);
            match query.split('&').find_map(value) {
                Some(value) if kind == DatabaseKind::Postgres && !value.is_empty() => {
                    format!("{place} {name} {value}").trim_start().to_owned()
                }
                _ => place,
            }
        });
        // Two servers of one machine differ in it.
        let place = match query.split('&').find_map(|pair| pair.strip_prefix("port=")) {
            Some(port) if kind == DatabaseKind::Postgres && !port.is_empty() => format!("{place}:{port}"),
            _ => place,
        };
        Self::of_server(kind, &place, [user, password, database], url)
    }

    fn of_server(
        kind: DatabaseKind,
        place: &str,
        [user, password, database]: [String; 3],
        url: &str,
    ) -> Result<Self, String> {
        let place = if place.is_empty() { "the default host" } else { place };
        let mut target = Self {
            kind,
            server: format!("{}://{place}", kind.name()),
            shown: visible(&format!("{} {user}@{place}/{database}", kind.name())),
            database,
            url: url.to_owned(),
            redactor: Redactor::default(),
            in_memory: false,
            read_only: false,
        };
        let (hosts, parameters) = target.address();
        // It may be the rest of a password, and libpq would quote it.
        if parameters.iter().skip_while(|(name, _)| !name.contains("password")).any(|(name, _)| is_unknown(name)) {
            return Err(malformed(kind, "an unknown parameter follows a password: encode or quote its `&` and spaces"));
        }
        let (harmless, secret): (Pairs, Pairs) = parameters.into_iter().partition(|(name, _)| is_harmless(name));
        let is_name = |(name, value): &(String, String)| NAMES.contains(&name.as_str()) || value.contains('/');
        let names = values(harmless.into_iter().filter(is_name));
        let names = names.chain(hosts.into_iter().flat_map(|(host, port)| [host, port]));
        let names = names.flat_map(|name| name.split(',').map(str::to_owned).collect::<Vec<_>>());
        let of_target = [user, target.database.clone(), target.shown.clone()];
        target.redactor = Redactor::new(values(secret).chain([password]), names.chain(of_target));
        Ok(target)
    }

    /// libpq's `keyword = value` form.
    fn keywords(url: &str) -> Result<Self, String> {
        let kind = DatabaseKind::Postgres;
        let wrong = || {
            malformed(
                kind,
                "it is neither `postgres://..` nor a list of `keyword=value` (values with spaces stand in single quotes)",
            )
        };
        let [mut host, mut port, mut user, mut database, mut service] = [const { String::new() }; 5];
        let mut rest = url.trim();
        while !rest.is_empty() {
            let (name, after) = rest.split_once('=').ok_or_else(wrong)?;
            let name = name.trim();
            if name.is_empty() || !name.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
                return Err(wrong());
            }
            let (value, remaining) = keyword_value(after.trim_start()).ok_or_else(wrong)?;
            let looks_like_url =
                value.contains('=') || value.contains("://") || value.contains('@') && value.contains(':');
            if NAMES.contains(&name) && looks_like_url || is_harmless(name) && value.contains("password=") {
                return Err(malformed(kind, "a value holds a URL or another keyword: spaces separate the keywords"));
            }
            match name {
                "host" | "hostaddr" => host = value,
                "port" => port = value,
                "user" => user = value,
                "dbname" => database = value,
                "service" => service = value,
                _ => {}
            }
            rest = remaining.trim_start();
        }
        if !port.is_empty() && port.split(',').any(|port| port.parse::<u16>().is_err()) {
            return Err(malformed(kind, "the port is not a number from 0 to 65535"));
        }
        let place = if port.is_empty() { host } else { format!("{host}:{port}") };
        let place =
            if service.is_empty() { place } else { format!("{place} service {service}").trim_start().to_owned() };
        Self::of_server(kind, &place, [user, String::new(), database], url)
    }

    fn file(url: &str) -> Result<Self, String> {
        let path = url.strip_prefix("sqlite://").or(url.strip_prefix("sqlite:")).unwrap_or(url);
        // Diesel turns `sqlite://` into `file:`, which SQLite reads as a URI.
        let uri = path.strip_prefix("file:").or(url.strip_prefix("sqlite://"));
        let uri = uri.map(FileUri::parse).transpose()?;
        let is_memory = match &uri {
            Some(uri) => uri.is_memory() || uri.path == "/:memory:" && url.starts_with("sqlite://"),
            None => path.is_empty() || path == ":memory:",
        };
        if is_memory {
            let name = ":memory:".to_owned();
            // A name that begins with a slash is one database for the whole process.
            let named = uri.as_ref().filter(|uri| uri.is_shared_memory());
            let url = named.map_or_else(|| name.clone(), |uri| format!("file:{}", uri.text));
            return Ok(Self {
                kind: DatabaseKind::Sqlite,
                server: "sqlite".into(),
                shown: "SQLite :memory:".into(),
                database: name,
                url,
                redactor: Redactor::new(
                    named.into_iter().flat_map(FileUri::secrets),
                    named.map(|uri| uri.path.clone()),
                ),
                in_memory: true,
                read_only: false,
            });
        }
        // SQLite would make a file of that name, password included.
        let name = uri.as_ref().map_or(path, |uri| uri.written);
        let schemes = ["postgres", "mysql", "mariadb", "http"];
        let has_at = path.split('?').next().is_some_and(|path| path.contains('@'));
        let of_a_server = has_at || schemes.iter().any(|scheme| name.starts_with(scheme));
        if name.contains("://") || name.contains("password=") || of_a_server && name.contains([':', '=']) {
            return Err(malformed(DatabaseKind::Sqlite, "it looks like the URL of a server"));
        }
        if uri.is_none() && name.contains('?') {
            return Err(malformed(
                DatabaseKind::Sqlite,
                "a plain path has no parameters; those follow sqlite://path or file:path",
            ));
        }
        let file = uri.as_ref().map_or(path, |uri| &uri.path);
        let database = absolute(Path::new(file)).to_string_lossy().into_owned();
        let names = [name.to_owned(), file.to_owned(), database.clone()];
        Ok(Self {
            kind: DatabaseKind::Sqlite,
            server: "sqlite".into(),
            shown: format!("SQLite {}", visible(file)),
            database,
            url: uri.as_ref().map_or_else(|| path.to_owned(), |uri| format!("file:{}", uri.text)),
            redactor: Redactor::new(uri.iter().flat_map(FileUri::secrets), names),
            in_memory: false,
            read_only: uri.is_some_and(|uri| uri.is_read_only()),
        })
    }

    /// Why a SQLite file cannot be opened, as far as that can be seen.
    pub(crate) fn why_no_file(&self) -> Option<String> {
        if self.kind != DatabaseKind::Sqlite || self.in_memory {
            return None;
        }
        let path = Path::new(&self.database);
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty())?;
        let shown = visible(folder.to_str()?);
        if !folder.exists() {
            return Some(format!("the folder {shown} does not exist"));
        }
        if !folder.is_dir() {
            return Some(format!("{shown} is a file, not a folder"));
        }
        if path.is_dir() {
            return Some("it is a folder, not a file".into());
        }
        (!path.exists()).then(|| format!("there is no such file in the folder {shown}, and none was made"))
    }

    /// The database in memory that the URL names for the whole process; `None` if the application has one of its own.
    pub(crate) fn shared_memory(&self) -> Option<&str> {
        (self.in_memory && self.url != ":memory:").then_some(&self.url)
    }
}

/// What follows `file:`, read as SQLite does.
struct FileUri<'u> {
    /// Without the fragment.
    text: &'u str,
    /// The path as it is written.
    written: &'u str,
    path: String,
    query: &'u str,
}

impl<'u> FileUri<'u> {
    fn parse(text: &'u str) -> Result<Self, String> {
        let text = text.split('#').next().unwrap_or_default();
        let (name, query) = text.split_once('?').unwrap_or((text, ""));
        let written = match name.strip_prefix("//") {
            Some(rest) => {
                let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                if !authority.is_empty() && authority != "localhost" {
                    let reason = "SQLite takes no host in `file://host/path` but `localhost`; a file is file:/path or file:///path";
                    return Err(malformed(DatabaseKind::Sqlite, reason));
                }
                path
            }
            None => name,
        };
        Ok(Self { text, written, path: uri_decode(written), query })
    }

    /// The value of a parameter; of several the last counts.
    fn parameter(&self, name: &str) -> Option<String> {
        self.pairs().rev().find(|(found, _)| uri_decode(found) == name).map(|(_, value)| uri_decode(value))
    }

    fn pairs(&self) -> impl DoubleEndedIterator<Item = (&'u str, &'u str)> {
        self.query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")))
    }

    /// The values of the parameters that may hold a password or a key.
    fn secrets(&self) -> impl Iterator<Item = String> {
        let secret = self.pairs().filter(|(name, _)| !is_harmless(&uri_decode(name)));
        // It may decode to bytes that are no text.
        secret.flat_map(|(_, value)| [value.to_owned(), uri_decode(value)])
    }

    /// Whether nothing of it is ever in a file that stays.
    fn is_memory(&self) -> bool {
        self.path.is_empty()
            || self.path == ":memory:"
            || self.parameter("mode").is_some_and(|mode| mode == "memory")
            || self.is_memdb()
    }

    fn is_memdb(&self) -> bool {
        self.parameter("vfs").is_some_and(|vfs| vfs == "memdb")
    }

    fn is_shared_memory(&self) -> bool {
        self.is_memdb() && self.path.starts_with('/')
    }

    fn is_read_only(&self) -> bool {
        let immutable = self.parameter("immutable").map(|value| value.to_ascii_lowercase());
        self.parameter("mode").is_some_and(|mode| mode == "ro")
            || immutable.is_some_and(|value| {
                ["yes", "true", "on"].contains(&value.as_str()) || value.parse::<i64>().is_ok_and(|number| number != 0)
            })
    }
}

/// Whether it is a URL and no list of `keyword=value`, of which a value may have anything in it.
pub(crate) fn is_url(url: &str) -> bool {
    url.split_once("://").is_some_and(|(scheme, _)| scheme.chars().all(|c| c.is_ascii_alphanumeric()))
}

/// As SQLite does: what is no code stays as it is, and the code of NUL ends the path, name or value in which it stands.
fn uri_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code =
            text.get(at + 1..at + 3).filter(|code| bytes[at] == b'%' && code.bytes().all(|c| c.is_ascii_hexdigit()));
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(0) => break,
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

type Pairs = Vec<(String, String)>;

fn values(pairs: impl IntoIterator<Item = (String, String)>) -> impl Iterator<Item = String> {
    pairs.into_iter().map(|(_, value)| value)
}

/// What is at the other end of a connection's socket, as far as the URL tells.
#[cfg(target_os = "linux")]
#[derive(Debug)]
pub(crate) struct Peer {
    kind: DatabaseKind,
    /// Empty if the URL leaves the port to something that is not read here.
    ports: Vec<u16>,
}

#[cfg(target_os = "linux")]
impl Peer {
    pub(crate) fn may_have_port(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.contains(&port)
    }

    pub(crate) fn may_have_path(&self, path: &Path) -> bool {
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        match self.kind {
            DatabaseKind::Postgres => {
                let port = name.strip_prefix(".s.PGSQL.").and_then(|port| port.parse().ok());
                port.is_some_and(|port| self.may_have_port(port))
            }
            DatabaseKind::Mysql => true,
            DatabaseKind::Sqlite => false,
        }
    }
}

#[cfg(target_os = "linux")]
impl Target {
    pub(crate) fn peer(&self) -> Peer {
        let (hosts, parameters) = self.address();
        let of = |wanted: &str| parameters.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let written: Vec<_> = hosts.iter().filter_map(|(_, port)| port.parse().ok()).collect();
        let ports = match (of("port"), self.kind) {
            (Some(ports), _) => ports.split(',').filter_map(|port| port.parse().ok()).collect(),
            (None, DatabaseKind::Postgres) if !written.is_empty() && hosts.len() == written.len() => written,
            (None, DatabaseKind::Postgres) if of("service").is_some() || set("PGSERVICE").is_some() => Vec::new(),
            (None, DatabaseKind::Postgres) => {
                let default = set("PGPORT").map_or(Some(5432), |port| port.parse().ok());
                written.into_iter().chain(default).collect()
            }
            (None, DatabaseKind::Mysql) if written.is_empty() => Vec::new(),
            (None, _) => written,
        };
        Peer { kind: self.kind, ports }
    }

    /// Whether the URL leads to a socket of this machine that is no network.
    pub(crate) fn is_local(&self) -> bool {
        let (hosts, parameters) = self.address();
        let of = |wanted: &str| parameters.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.clone());
        match self.kind {
            DatabaseKind::Postgres if of("hostaddr").is_some() => false,
            DatabaseKind::Postgres => match of("host") {
                Some(host) => host.split(',').all(|host| host.is_empty() || host.starts_with(['/', '@'])),
                None => hosts.iter().all(|(host, _)| host.is_empty() || host.starts_with(['/', '@'])),
            },
            DatabaseKind::Mysql => {
                of("unix_socket").is_some() || hosts.iter().all(|(host, _)| host.is_empty() || host == "localhost")
            }
            DatabaseKind::Sqlite => false,
        }
    }
}

impl Target {
    /// Hosts and ports of the URL's authority, and all parameters; values are decoded.
    fn address(&self) -> (Pairs, Pairs) {
        let decoded = |text: &str| percent_decode(text).unwrap_or_else(|| text.to_owned());
        let Some((_, rest)) = self.url.split_once("://").filter(|_| is_url(&self.url)) else {
            let mut parameters = Vec::new();
            let mut rest = self.url.trim();
            while let Some((name, after)) = rest.split_once('=') {
                let Some((value, remaining)) = keyword_value(after.trim_start()) else { break };
                parameters.push((name.trim().to_owned(), value));
                rest = remaining.trim_start();
            }
            return (Vec::new(), parameters);
        };
        let (authority, query) = rest.split_once('?').unwrap_or((rest, ""));
        let authority = authority.split('/').next().unwrap_or_default();
        let hosts = authority.rsplit('@').next().unwrap_or_default();
        let host = |text: &str| match text.rsplit_once(':') {
            Some((name, port)) if !name.starts_with('[') || name.ends_with(']') => (decoded(name), port.to_owned()),
            _ => (decoded(text), String::new()),
        };
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let parameters = pairs.map(|(name, value)| (decoded(name), decoded(value))).collect();
        (hosts.split(',').filter(|text| !text.is_empty()).map(host).collect(), parameters)
    }
}

/// The server and the database of a valid URL; nothing of any other text.
pub(crate) fn redacted(url: &str) -> String {
    Target::parse(url, None).map_or_else(|_| MASK.into(), |target| target.shown)
}

fn malformed(kind: DatabaseKind, reason: &str) -> String {
    format!("the {} database URL is malformed: {reason}. Expected {}", kind.name(), kind.url_form())
}

/// One value of libpq's keyword form, and what follows it.
fn keyword_value(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let quoted = text.starts_with('\'');
    let mut chars = text.char_indices().skip(usize::from(quoted));
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.push(chars.next()?.1),
            '\'' if quoted => return Some((value, &text[at + 1..])),
            c if !quoted && c.is_whitespace() => return Some((value, &text[at..])),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, ""))
}

/// An absolute path whose folder has no links, whether or not the file is there yet.
fn absolute(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if let Ok(real) = whole.canonicalize() {
        return real;
    }
    match (whole.parent().map(Path::canonicalize), whole.file_name()) {
        (Some(Ok(folder)), Some(name)) => folder.join(name),
        _ => whole,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    const PASSWORD: &str = "hunter2secret";

    /// What people write when they get a URL wrong.
    const SLIPS: &[&str] = &[
        "postgres:/app:hunter2secret@h/db",
        "postgresql//app:hunter2secret@h/db",
        "postgres//app:hunter2secret@h/db",
        "postgres://app:hunter2secret%et@h/db",
        "postgres://app:hunter2secret/rest@h/db",
        "postgres://app:hunter2secret@x@h/db",
        "postgres://app:x@hunter2secret@h/db",
        "postgres://app:hunter2secret#x@h/db",
        "postgres://app:x#hunter2secret@h/db",
        "postgres://app:x?hunter2secret@h/db",
        "postgres://app:hunter2 hunter2secret@h/db",
        "postgres://app:hunter2secret@h:port/db",
        "postgres://app:hunter2secret@h:99999/db",
        "postgres://app:hunter2secret@h/db?sslmode",
        "postgres://app:hunter2secret@h/%zz",
        "host=h user=app password=two hunter2secret",
        "host=h user=app password='hunter2secret",
        "host=h port=x password=hunter2secret",
        "host=h,passwd=hunter2secret",
        "host=h;user=app;pwd=hunter2secret",
        "host=app:hunter2secret@h",
        "host=h sslmode=require,password=hunter2secret",
        "host=h password=two secret=hunter",
        "postgres://app:1?secret=hunter@h/db",
        "postgres://app@h/db?password=x&secret=hunter",
        "postgres://app:hunter2secret@[::1/db",
        "postgres://app:hunter2secret@[::1]x/db",
        "dbname=postgres://app:hunter2secret@h/db",
        "password=hunter2secret",
        "app:hunter2secret@h/db",
        "//app:hunter2secret@h/db",
        "mysql:/app:hunter2secret@h/db",
        "mysql//app:hunter2secret@h/db",
        "mysql://app:hunter2secret%@h/db",
        "mysql://app:hunter2secret@h:x/db",
        "mysql://app:hunter2secret@h/a/b",
        "mysql://app:hunter2secret@x@h/db",
        "mariadb://app:hunter2secret@h/shop.db",
        "http://app:hunter2secret@h/db",
        "postgres://app:hunter2secret\0@h/db",
    ];

    /// For SQLite any text is a path, so that only what still looks like a server's URL is held back there.
    fn all_texts(url: &str, kinds: &[Option<DatabaseKind>]) -> String {
        let mut texts = redacted(url);
        for &kind in kinds {
            match Target::parse(url, kind) {
                Ok(target) => texts.push_str(&format!("{} {} {target:?}", target.shown, target.server)),
                Err(reason) => texts.push_str(&reason),
            }
        }
        texts + &format!("{:?}", crate::Config::new(url))
    }

    #[test]
    fn no_slip_shows_the_password() {
        for slip in SLIPS {
            let texts = all_texts(
                slip,
                &[None, Some(DatabaseKind::Postgres), Some(DatabaseKind::Mysql), Some(DatabaseKind::Sqlite)],
            );
            assert!(!texts.contains("hunter2") && !texts.contains("secret"), "{slip}: {texts}");
        }
    }

    #[test]
    fn what_was_understood_is_shown_without_the_password() {
        let shown = |url| Target::parse(url, None).expect(url).shown;
        assert_eq!(shown("postgres://app:hunter2secret@db:5433/shop?sslmode=require"), "PostgreSQL app@db:5433/shop");
        assert_eq!(shown("host=db user=app password='hunter2 secret' dbname=shop"), "PostgreSQL app@db/shop");
        assert_eq!(shown("mysql://app:hunter2secret@[::1]:3307/shop"), "MySQL app@[::1]:3307/shop");
        assert_eq!(shown("sqlite://shop.sqlite"), "SQLite shop.sqlite");
        assert_eq!(shown(":memory:"), "SQLite :memory:");
    }

    #[test]
    fn error_of_an_unencoded_password_names_the_character() {
        for (password, encoded) in [
            ("a@b", "%40"),
            ("a/b", "%2F"),
            ("a?b", "%3F"),
            ("1?b=c", "%3F"),
            ("1/b?c=", "%3F"),
            ("a#b", "%23"),
            ("a%b", "%25"),
        ] {
            for scheme in ["postgres", "postgresql", "mysql"] {
                let reason = Target::parse(&format!("{scheme}://app:{password}@h/db"), None).expect_err(password);
                assert!(reason.contains(encoded) && !reason.contains(password), "{password}: {reason}");
            }
        }
        let with_colon = Target::parse("postgres://app:a:bcd@h/db", None).expect("the first `:` ends the user");
        assert_eq!(with_colon.redact("no a:bcd"), "no ***");
    }

    #[test]
    fn driver_texts_stay_readable() {
        let socket = "connection to server on socket \"/var/run/postgresql/.s.PGSQL.5432\" failed: FATAL: password \
                      authentication failed for user \"postgres\"";
        let host = "connection to server at \"localhost\" (127.0.0.1), port 5432 failed: FATAL: database \"app\" does \
                    not exist";
        let mysql = "Access denied for user 'root'@'localhost' (using password: YES)";
        let socket_folder = "connection to server on socket \"/run/hunter2/.s.PGSQL.5433\" failed: No such file";
        let cases = [
            ("postgres://postgres:postgres@localhost/app", socket),
            ("postgres://postgres:password@localhost/app", socket),
            ("postgres://postgres:5432@localhost/app", socket),
            ("postgres://postgres:localhost@localhost/app", host),
            ("postgres://app:app@localhost/app", host),
            ("postgres://app:se@localhost/app", host),
            ("host=localhost user=postgres password=postgres dbname=app", socket),
            ("mysql://root:root@localhost/shop", mysql),
            ("postgres://hunter2-app:hunter2@/shop?host=%2Frun%2Fhunter2&port=5433", socket_folder),
            ("postgres://hunter2@h/shop", "FATAL: role \"hunter2\" does not exist"),
        ];
        for (url, text) in cases {
            assert_eq!(Target::parse(url, None).expect(url).redact(text), text, "{url}");
        }
    }

    #[test]
    fn every_password_of_a_url_is_redacted() {
        let cases = [
            ("postgres://app:hun%74er2@h/db", "no hunter2, no hun%74er2\n", "no ***, no ***"),
            ("host=h password='hun  ter2'", "no hun  ter2:\n\tneither  here", "no ***: neither here"),
            ("postgres://app:hunter2@h1,h2:5433/db?sslpassword=key%20two", "hunter2 'key two'", "*** '***'"),
            ("postgres://app@h/db?password=hunter2&password=hunter3", "hunter2 hunter3", "*** ***"),
            ("host=h pasword=hunter2 sslkey=/srv/hunter3", "hunter2 /srv/hunter3 pasword", "*** /srv/hunter3 pasword"),
            ("file:/srv/a.db?key=hunter2&mode=ro", "hunter2 /srv/a.db ro", "*** /srv/a.db ro"),
        ];
        for (url, text, redacted) in cases {
            assert_eq!(Target::parse(url, None).expect(url).redact(text), redacted, "{url}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn peer_has_the_ports_of_the_url() {
        let cases: &[(&str, bool, &[u16])] = &[
            ("postgres://app@db:5433/shop", false, &[5433]),
            ("postgres://app@db:5433,db2:5434/shop", false, &[5433, 5434]),
            ("postgres://app:p%40ss@[::1]:5433/shop", false, &[5433]),
            ("postgres://app@db/shop?port=6000", false, &[6000]),
            ("postgres:///shop?host=%2Fvar%2Frun&port=5433", true, &[5433]),
            ("postgres://%2Fvar%2Frun:5433/shop", true, &[5433]),
            ("postgres://db:5433/shop?hostaddr=10.0.0.1", false, &[5433]),
            ("host=/var/run port=5433 password='a b'", true, &[5433]),
            ("host=db port = 5433", false, &[5433]),
            ("postgres:///shop?service=x", true, &[]),
            ("mysql://app@127.0.0.1:3307/shop", false, &[3307]),
            ("mysql://app@localhost/shop", true, &[]),
            ("mysql://app@h/shop?unix_socket=%2Ftmp%2Fs", true, &[]),
        ];
        for (url, local, ports) in cases {
            let target = Target::parse(url, None).expect(url);
            assert_eq!((target.is_local(), &target.peer().ports[..]), (*local, *ports), "{url}");
        }
    }

    #[test]
    fn mariadb_is_told_its_scheme() {
        for kind in [None, Some(DatabaseKind::Mysql)] {
            let refused = Target::parse("mariadb://h/shop.db", kind).expect_err("no scheme of ours");
            assert!(refused.contains("mysql://user:password@host:port/database"), "{refused}");
        }
    }

    #[test]
    fn parameters_are_added_in_the_urls_own_syntax() {
        let with = |url| Target::parse(url, None).expect(url).with_parameters(&[("a", "b c'".into())]);
        assert_eq!(with("postgres://h/db"), "postgres://h/db?a=b%20c%27");
        assert_eq!(with("postgres://h/db?x=y"), "postgres://h/db?x=y&a=b%20c%27");
        assert_eq!(with("host=h"), "host=h a='b c\\''");
        assert!(Target::parse("host=h connect_timeout = 4", None).expect("valid").sets("connect_timeout"));
        assert!(!Target::parse("host=connect_timeout", None).expect("valid").sets("connect_timeout"));
        // A value may have anything in it.
        let odd = "host=h application_name='a://b?c connect_timeout=4'";
        assert!(!Target::parse(odd, None).expect("valid").sets("connect_timeout"));
        assert_eq!(with(odd), format!("{odd} a='b c\\''"));
        assert!(!Target::parse("postgres://u:a&connect_timeout=4@h/db", None).expect("valid").sets("connect_timeout"));
    }

    #[test]
    fn a_file_has_one_name_however_it_is_written() {
        let name = |url| Target::parse(url, Some(DatabaseKind::Sqlite)).expect(url).database;
        assert_eq!(name("shop.sqlite"), name("./shop.sqlite"));
        assert_eq!(name("shop.sqlite"), name("sqlite://shop.sqlite"));
        assert_eq!(name("shop.sqlite"), name("file:shop.sqlite?cache=private"));
        assert!(Target::parse("file::memory:?cache=shared", Some(DatabaseKind::Sqlite)).expect("valid").in_memory);
    }

    #[test]
    fn sqlite_url_is_read_as_sqlite_reads_it() {
        let memory = Some(":memory:");
        // What is opened (the path, `:memory:`, or a shared name in memory), and whether for reading only.
        let cases: &[(&str, Option<&str>, &str, bool)] = &[
            (":memory:", memory, ":memory:", false),
            ("sqlite::memory:", memory, ":memory:", false),
            ("sqlite://:memory:", memory, ":memory:", false),
            ("sqlite:///:memory:", memory, ":memory:", false),
            ("sqlite://", memory, ":memory:", false),
            ("file::memory:", memory, ":memory:", false),
            ("file::memory:?cache=shared", memory, ":memory:", false),
            ("file:", memory, ":memory:", false),
            ("file:?mode=memory", memory, ":memory:", false),
            ("file:shop?mode=memory&cache=shared", memory, ":memory:", false),
            ("file:shop?cache=shared&mode=memory", memory, ":memory:", false),
            ("file:shop?mode=%6demory", memory, ":memory:", false),
            ("file:shop?mode=ro&mode=memory", memory, ":memory:", false),
            ("sqlite://shop?mode=memory", memory, ":memory:", false),
            ("file:shop?vfs=memdb", memory, ":memory:", false),
            ("file:/shop?vfs=memdb", memory, "file:/shop?vfs=memdb", false),
            (
                "file:/srv/mode=memory/a.sqlite",
                Some("/srv/mode=memory/a.sqlite"),
                "file:/srv/mode=memory/a.sqlite",
                false,
            ),
            ("file:/srv/a?note=mode=memory", Some("/srv/a"), "file:/srv/a?note=mode=memory", false),
            ("file:/srv/a?mode=memory%00x", memory, ":memory:", false),
            ("file:/srv/a?mode%00x=memory", memory, ":memory:", false),
            ("file:/srv/a?=x&mode=memory", memory, ":memory:", false),
            ("file:/srv/a%00b?mode=rwc", Some("/srv/a"), "file:/srv/a%00b?mode=rwc", false),
            ("file:/srv/a?xmode=memory", Some("/srv/a"), "file:/srv/a?xmode=memory", false),
            ("file:/srv/a?mode=memory&mode=rwc", Some("/srv/a"), "file:/srv/a?mode=memory&mode=rwc", false),
            ("file:/srv/a?mode=memoryless", Some("/srv/a"), "file:/srv/a?mode=memoryless", false),
            ("file:/srv/a#?mode=memory", Some("/srv/a"), "file:/srv/a", false),
            ("file:/srv/vfs=memdb", Some("/srv/vfs=memdb"), "file:/srv/vfs=memdb", false),
            ("file:/srv/:memory:", Some("/srv/:memory:"), "file:/srv/:memory:", false),
            ("file:/srv/a%20b%3fc", Some("/srv/a b?c"), "file:/srv/a%20b%3fc", false),
            ("file:/srv/100%", Some("/srv/100%"), "file:/srv/100%", false),
            ("file:///srv/a", Some("/srv/a"), "file:///srv/a", false),
            ("file://localhost/srv/a", Some("/srv/a"), "file://localhost/srv/a", false),
            ("sqlite:///srv/a%20b", Some("/srv/a b"), "file:/srv/a%20b", false),
            ("sqlite:///srv/a?mode=ro", Some("/srv/a"), "file:/srv/a?mode=ro", true),
            ("file:/srv/a?mode=ro", Some("/srv/a"), "file:/srv/a?mode=ro", true),
            ("file:/srv/a?immutable=1", Some("/srv/a"), "file:/srv/a?immutable=1", true),
            ("file:/srv/a?immutable=0", Some("/srv/a"), "file:/srv/a?immutable=0", false),
            ("file:/srv/a?note=http://h/x", Some("/srv/a"), "file:/srv/a?note=http://h/x", false),
            ("file:/srv/me@home/a?mode=ro", Some("/srv/me@home/a"), "file:/srv/me@home/a?mode=ro", true),
            ("/srv/mode=memory.sqlite", Some("/srv/mode=memory.sqlite"), "/srv/mode=memory.sqlite", false),
        ];
        for (url, database, driver, read_only) in cases {
            let target = Target::parse(url, Some(DatabaseKind::Sqlite)).expect(url);
            let found = (Some(target.database.as_str()), target.url.as_str(), target.read_only);
            assert_eq!(found, (*database, *driver, *read_only), "{url}");
            assert_eq!(target.in_memory, *database == memory, "{url}");
        }
        for url in ["file://elsewhere/srv/a", "file:postgres://app@h/db", "sqlite:a.db?key=hunter2"] {
            Target::parse(url, Some(DatabaseKind::Sqlite)).expect_err(url);
        }
    }

    /// Passwords that are names in [`URLS`] or words of drivers.
    const COMMON: &[&str] = &["app", "shop", "db.example", "5433", "password", "localhost", "Postgres"];

    /// Texts of libpq and MySQL, without a password.
    const TEXT: &str = "connection to server at \"db.example\" (10.0.0.1), port 5433 failed: FATAL: password authentication \
                        failed for user \"app\", database \"shop\": Access denied for 'app'@'db.example' (using password: YES)";

    /// `PW` is the password in a URL, `QUOTED` in libpq's quotes.
    const URLS: &[&str] = &[
        "postgres://app:PW@db.example:5433/shop",
        "postgresql://app@db.example:5433/shop?sslmode=require&password=PW",
        "postgres://app:PW@db.example:5433,db2.example/shop?sslpassword=PW",
        "mysql://app:PW@db.example:5433/shop",
        "host=db.example port=5433 user=app password='QUOTED' dbname=shop",
    ];

    fn percent_encoded(password: &str, choices: &[(bool, bool)]) -> String {
        let mut choices = choices.iter().cycle();
        let mut encoded = String::new();
        for c in password.chars() {
            let &(always, lower) = choices.next().expect("it is a cycle");
            if c.is_ascii_alphanumeric() && !always {
                encoded.push(c);
            } else {
                for byte in c.to_string().bytes() {
                    encoded += &if lower { format!("%{byte:02x}") } else { format!("%{byte:02X}") };
                }
            }
        }
        encoded
    }

    fn quoted(password: &str) -> String {
        password.replace('\\', "\\\\").replace('\'', "\\'")
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

        #[test]
        fn redaction_removes_the_password_and_nothing_else(
            password in prop_oneof![
                4 => "[ -~\t\näß€]{0,8}[a-z0-9][ -~\t\näß€]{0,8}",
                1 => proptest::sample::select(COMMON).prop_map(String::from),
            ],
            url in proptest::sample::select(URLS),
            choices in proptest::collection::vec(any::<(bool, bool)>(), 5),
        ) {
            let encoded = percent_encoded(&password, &choices);
            let filled = |encoded: &str, quoted: &str| url.replace("PW", encoded).replace("QUOTED", quoted);
            let (shown, url) = (filled(MASK, MASK), filled(&encoded, &quoted(&password)));
            let target = Target::parse(&url, None).expect("every special character is encoded");
            prop_assert_eq!(target.redact(TEXT), TEXT);
            let echoes = [
                (format!("cannot reach {url} as app"), format!("cannot reach {shown} as app")),
                (format!("{url:?} or app"), format!("{shown:?} or app")),
                (format!("{:?} or app", url.as_bytes()), format!("[{shown}] or app")),
                (
                    format!("ALTER ROLE app PASSWORD '{}' for app", password.replace('\'', "''")),
                    "ALTER ROLE app PASSWORD '***' for app".to_owned(),
                ),
            ];
            for (text, redacted) in echoes {
                prop_assert_eq!(target.redact(&text), redacted);
            }
            let is_common = password.chars().count() < 4 || COMMON.contains(&password.as_str());
            let spellings = [password.clone(), encoded, quoted(&password)];
            for spelling in spellings.iter().filter(|_| !is_common) {
                let text = format!("it says {spelling} is wrong for app");
                prop_assert_eq!(target.redact(&text), "it says *** is wrong for app");
            }
        }

        /// A driver that reads a URL in another way than the crate could quote a piece of the password as a host or a parameter.
        #[test]
        fn url_with_an_unencoded_password_is_rejected_or_read_as_a_whole(
            password in "[ZXWJ07:/?#@%&= '\\\\\\[\\],.]{1,8}",
            url in proptest::sample::select(URLS),
        ) {
            let url = url.replace("PW", &password).replace("QUOTED", &password);
            for kind in [None, Some(DatabaseKind::Postgres), Some(DatabaseKind::Mysql), Some(DatabaseKind::Sqlite)] {
                let texts = match Target::parse(&url, kind) {
                    Ok(target) => {
                        format!("{target:?} {} {} {}", target.server, target.database, target.redact(&format!("{url} {url:?}")))
                    }
                    Err(reason) => reason,
                };
                prop_assert!(!texts.contains(['Z', 'X', 'W', 'J']), "{} {:?}: {}", url, kind, texts);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

        #[test]
        fn no_mutation_shows_the_password(slip in 0..SLIPS.len(), at in 0..40_usize, insert in ".{0,3}", cut in 0..3_usize) {
            // Elsewhere one character less makes it a name.
            let in_its_place =
                |slip: &&str| slip.contains(":hunter2secret") && !slip.starts_with("host=") || slip.contains("password=");
            let slips: Vec<&str> = SLIPS.iter().copied().filter(in_its_place).collect();
            let slip = slips[slip % slips.len()];
            // Only outside of the password, which is looked for as it is.
            let start = slip.find(PASSWORD).unwrap_or(slip.len());
            let at = if at + cut <= start { at } else { (at + PASSWORD.len() + cut).min(slip.len()) };
            let mut chars: Vec<char> = slip.chars().collect();
            let end = (at + cut).min(chars.len());
            chars.splice(at..end, insert.chars());
            let url: String = chars.into_iter().collect();
            let texts = all_texts(&url, &[None, Some(DatabaseKind::Postgres), Some(DatabaseKind::Mysql)]);
            prop_assert!(!texts.contains(PASSWORD), "{url}: {texts}");
        }
    }
}
