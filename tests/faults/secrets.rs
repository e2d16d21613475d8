//! Malformed and mutated database URLs: errors, logs and `Debug` output show no piece of the password.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, Once};
use std::time::Duration;

use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::{Config, Database, SessionConnection};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::RngSeed;

use crate::fixtures::{AnyConnection, logged};

/// Passwords whose pieces are in no other text: plain, and as a URL has them.
const PASSWORDS: &[(&str, &str)] =
    &[("qZ7xWv9kJ3", "qZ7xWv9kJ3"), ("jX!zQ/w@9Vk#", "jX%21zQ%2Fw%409Vk%23"), ("yüQzX%wJ&9", "y%C3%BCQzX%25wJ%269")];

/// `PW` is the password as a URL has it, `RAW` is the plain password. Nothing listens at these addresses.
const URLS: &[&str] = &[
    "postgres://app:PW@127.0.0.1:1/db",
    "postgresql://app:PW@127.0.0.1:1/db?sslmode=disable",
    "postgres://app@127.0.0.1:1/db?password=PW",
    "postgres://app:x@127.0.0.1:1/db?sslpassword=PW",
    "postgres://app:PW@127.0.0.1:1/db?sslmode=wrong",
    "postgres://app:PW@127.0.0.1:1/db?unheard_of=1",
    "postgres://app:PW@127.0.0.1:1/db?application_name=PW",
    "postgres://app:PW@/db?host=/nowhere/at/all",
    "postgres:/app:PW@127.0.0.1:1/db",
    "postgresql//app:PW@127.0.0.1:1/db",
    "postgres//app:PW@127.0.0.1:1/db",
    "postgres:app:PW@127.0.0.1:1/db",
    "postgres://app:PW%et@127.0.0.1:1/db",
    "postgres://app:PW%@127.0.0.1:1/db",
    "postgres://app:PW/rest@127.0.0.1:1/db",
    "postgres://app:RAW@127.0.0.1:1/db",
    "postgres://app:PW@x@127.0.0.1:1/db",
    "postgres://app:x@PW@127.0.0.1:1/db",
    "postgres://app:PW#x@127.0.0.1:1/db",
    "postgres://app:x#PW@127.0.0.1:1/db",
    "postgres://app:x?PW@127.0.0.1:1/db",
    "postgres://app:x PW@127.0.0.1:1/db",
    "postgres://app:PW@127.0.0.1:port/db",
    "postgres://app:PW@127.0.0.1:99999/db",
    "postgres://app:PW@127.0.0.1:1/db?sslmode",
    "postgres://app:PW@127.0.0.1:1/%zz",
    "postgres://app:PW",
    "postgres://:PW@127.0.0.1:1/db",
    "host=127.0.0.1 port=1 user=app password=RAW dbname=db",
    "host=127.0.0.1 port=1 user=app password='RAW' dbname=db",
    "host=127.0.0.1 port=1 user=app password=two RAW",
    "host=127.0.0.1 port=1 user=app password='RAW",
    "host=127.0.0.1 port=x password=RAW",
    "host=127.0.0.1 port=1 pasword=RAW",
    "host=127.0.0.1,port=1,password=RAW",
    "host=app:RAW@127.0.0.1",
    "postgres://app:x?y=PW@127.0.0.1:1/db",
    "postgres://app:1?y=PW@127.0.0.1:1/db",
    "postgres://app:PW@[::1/db",
    "dbname=postgres://app:PW@127.0.0.1:1/db",
    "password=RAW",
    "app:PW@127.0.0.1:1/db",
    "//app:PW@127.0.0.1:1/db",
    "mysql://app:PW@127.0.0.1:1/db",
    "mysql://app:PW@localhost/db?unix_socket=/nowhere/at/all",
    "mysql:/app:PW@127.0.0.1:1/db",
    "mysql//app:PW@127.0.0.1:1/db",
    "mysql:app:PW@127.0.0.1:1/db",
    "mysql://app:PW%@127.0.0.1:1/db",
    "mysql://app:RAW@127.0.0.1:1/db",
    "mysql://app:PW@127.0.0.1:x/db",
    "mysql://app:PW@127.0.0.1:1/a/b",
    "mysql://app:PW@x@127.0.0.1:1/db",
    "mysql://app:PW@127.0.0.1:1/db?ssl_mode=wrong",
    "mariadb://app:PW@127.0.0.1:1/db",
    "http://app:PW@127.0.0.1:1/db",
    "postgres://app:PW\0@127.0.0.1:1/db",
    "sqlite://app:PW@127.0.0.1:1/db",
    "sqlite:///nowhere/at/all.sqlite?key=PW",
    "file:/nowhere/at/all.db?key=PW",
    "file://app:PW@127.0.0.1/nowhere/at/all.db",
];

/// URLs that also name something by the text of the password: a name is never redacted.
const NAMES: &[&str] =
    &["postgres://app:PW@127.0.0.1:1/PW", "postgres://PW:PW@127.0.0.1:1/db", "mysql://app:PW@127.0.0.1:1/PW"];

/// What is done to a URL by chance.
#[derive(Debug, Clone)]
enum Mutation {
    Insert(Index, char),
    Remove(Index),
    Replace(Index, char),
    Swap(Index, Index),
    Duplicate(Index, usize, Index),
    Cut(Index),
}

const SEPARATORS: &str = ":/@?#=&%' ";

fn character() -> impl Strategy<Value = char> {
    prop_oneof![
        3 => proptest::sample::select(SEPARATORS.chars().collect::<Vec<_>>()),
        1 => proptest::sample::select("\\\n\t\0é,[]+.-_a0".chars().collect::<Vec<_>>()),
    ]
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<Index>;
    prop_oneof![
        3 => (at(), character()).prop_map(|(at, c)| Mutation::Insert(at, c)),
        3 => at().prop_map(Mutation::Remove),
        3 => (at(), character()).prop_map(|(at, c)| Mutation::Replace(at, c)),
        2 => (at(), at()).prop_map(|(one, other)| Mutation::Swap(one, other)),
        2 => (at(), 1..12_usize, at()).prop_map(|(from, length, to)| Mutation::Duplicate(from, length, to)),
        1 => at().prop_map(Mutation::Cut),
    ]
}

fn mutated(url: &str, mutations: &[Mutation]) -> String {
    let mut chars: Vec<char> = url.chars().collect();
    for mutation in mutations {
        let length = chars.len().max(1);
        let separators: Vec<usize> = (0..chars.len()).filter(|&at| SEPARATORS.contains(chars[at])).collect();
        match mutation {
            Mutation::Insert(at, c) => chars.insert(at.index(chars.len() + 1), *c),
            Mutation::Remove(at) if !chars.is_empty() => drop(chars.remove(at.index(length))),
            Mutation::Replace(at, c) if !chars.is_empty() => chars[at.index(length)] = *c,
            Mutation::Swap(one, other) if !separators.is_empty() => {
                chars.swap(separators[one.index(separators.len())], separators[other.index(separators.len())]);
            }
            Mutation::Duplicate(from, count, to) => {
                let from = from.index(length).min(chars.len());
                let piece: Vec<char> = chars[from..].iter().copied().take(*count).collect();
                let to = to.index(chars.len() + 1);
                chars.splice(to..to, piece);
            }
            Mutation::Cut(at) => chars.truncate(at.index(chars.len() + 1)),
            _ => {}
        }
    }
    chars.into_iter().collect()
}

thread_local! {
    /// What the panic hook was told of this thread, except of panics on purpose.
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    /// The texts of the URL that is being tried.
    static TEXTS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

const ON_PURPOSE: &str = "on purpose";

fn listen_to_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = info.to_string();
            if !text.contains(ON_PURPOSE) {
                PANICS.with_borrow_mut(|panics| panics.push(text));
                next(info);
            }
        }));
    });
}

fn note(text: String) {
    TEXTS.with_borrow_mut(|texts| texts.push(text));
}

/// A program's own function, which tells all it knows.
fn tells<C>(url: &str) -> ConnectionResult<C> {
    let list: Vec<u8> = url.bytes().collect();
    Err(ConnectionError::BadConnection(format!(
        "cannot reach {url} ({list:?}, {:?})",
        std::ffi::CString::new(list.clone())
    )))
}

fn panics<C>(url: &str) -> ConnectionResult<C> {
    panic!("{ON_PURPOSE}: {url} {:?}", url.as_bytes())
}

/// Everything that the library says about this URL; whether it took it for one.
fn drive<C: SessionConnection>(url: &str, kind: &str) -> bool {
    let config =
        || Config::new(url).connect_timeout(Duration::from_millis(300)).acquire_timeout(Duration::from_millis(300));
    note(format!("{:?}", config()));
    let plain = Database::<C>::without_migrations();
    let app = match plain.init_app("shop", config()) {
        Ok(app) => app,
        Err(error) => {
            note(format!("{error} {error:?} {:?}", std::error::Error::source(&error).map(ToString::to_string)));
            return false;
        }
    };
    note(format!("{app:?} {plain:?} {:?} {}", app.status(), app.status()));
    // Only where nothing but this machine is named: others are not asked.
    let place = app.status().server.rsplit(['@', ' ']).next().unwrap_or_default().to_owned();
    let local = place.starts_with("127.0.0.1:1/") || place.starts_with("/nowhere/at/all");
    if local && kind != "sqlite" || kind == "sqlite" && place.starts_with("/nowhere/at/all") {
        note(app.ping().unwrap_err().to_string());
    }
    for connect in [tells::<C>, panics::<C>] {
        let talkative = Database::<C>::without_migrations().connect_with(connect);
        let app = talkative.init_app("shop", config()).unwrap();
        let error = app.ping().unwrap_err();
        note(format!("{error} {error:?} {:?}", talkative.status()));
        note(format!("{:?}", app.dispose()));
    }
    note(format!("{:?}", plain.dispose_all()));
    true
}

/// The parts of a valid URL that the library may show. A mutation may have moved the password into one of them.
fn names(url: &str) -> Vec<String> {
    let Some((_, rest)) = url.split_once("://").filter(|(scheme, _)| !scheme.contains(['=', '@'])) else {
        let keys = ["host=", "hostaddr=", "port=", "user=", "dbname="];
        let values = keys.iter().flat_map(|key| url.split(key).skip(1).filter_map(|after| after.split(' ').next()));
        // For SQLite it is a path.
        let (path, query) = url.split_once('?').unwrap_or((url, ""));
        return values.chain([path]).map(decoded).chain(harmless(query)).collect();
    };
    let (authority, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (credentials, hosts) = authority.split_once('@').unwrap_or(("", authority));
    let user = credentials.split(':').next().unwrap_or_default();
    let path = tail.split('?').next().unwrap_or_default();
    let query = tail.split_once('?').map_or("", |(_, query)| query);
    [user, hosts, path].into_iter().map(decoded).chain(harmless(query)).collect()
}

/// The parameters of a query, those that may hold a secret by name only.
fn harmless(query: &str) -> impl Iterator<Item = String> {
    let is_secret = |pair: &str| pair.contains("password=") || pair.starts_with("key=");
    let shown =
        move |pair: &str| decoded(if is_secret(pair) { pair.split('=').next().unwrap_or_default() } else { pair });
    query.split('&').map(shown)
}

fn decoded(text: &str) -> String {
    let one_name = text.replace('&', "%26").replace('=', "%3D").replace('+', "%2B");
    let parsed = form_urlencoded::parse(one_name.as_bytes()).next();
    format!("{text} {}", parsed.map(|(name, _)| name).unwrap_or_default())
}

const PIECE: usize = 4;

/// The pieces of a password.
fn pieces((plain, encoded): (&str, &str)) -> BTreeSet<Vec<u8>> {
    [plain, encoded].into_iter().flat_map(|form| form.as_bytes().windows(PIECE)).map(<[u8]>::to_vec).collect()
}

fn contains(text: &str, piece: &[u8]) -> bool {
    text.as_bytes().windows(PIECE).any(|window| window == piece)
}

/// Tries a URL with every connection type and checks every text. Returns 1 if the password is also a name in the URL,
/// else 0.
fn try_url(url: &str, password: (&str, &str)) -> usize {
    let before = logged::count();
    TEXTS.take();
    PANICS.take();
    let accepted = Cell::new(false);
    let all = catch_unwind(AssertUnwindSafe(|| {
        let accepts = [
            drive::<PgConnection>(url, "postgres"),
            drive::<MysqlConnection>(url, "mysql"),
            drive::<SqliteConnection>(url, "sqlite"),
            drive::<AnyConnection>(url, "any"),
        ];
        accepted.set(accepts.contains(&true));
    }));
    assert!(all.is_ok(), "it panicked: {:?}", PANICS.take());
    let mut texts = TEXTS.take();
    texts.append(&mut PANICS.take());
    texts.extend(logged::lines_since(before));
    let names = if accepted.get() { names(url) } else { Vec::new() };
    let mut became_names = 0;
    for text in &texts {
        let list = |piece: &[u8]| piece.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        for piece in pieces(password).iter().filter(|piece| contains(text, piece) || text.contains(&list(piece))) {
            let shown = String::from_utf8_lossy(piece);
            assert!(names.iter().any(|name| contains(name, piece)), "{shown:?} of {url:?} in {text:?}");
            became_names = 1;
        }
    }
    became_names
}

fn filled(url: &str, password: (&str, &str)) -> String {
    url.replace("PW", password.1).replace("RAW", password.0)
}

#[test]
fn no_malformed_url_shows_its_password() {
    logged::listen();
    listen_to_panics();
    assert!(URLS.len() >= 28);
    for password in PASSWORDS {
        for url in URLS {
            let became_a_name = try_url(&filled(url, *password), *password);
            assert_eq!(became_a_name, 0, "{url}");
        }
    }
    for url in NAMES {
        assert_eq!(try_url(&filled(url, PASSWORDS[0]), PASSWORDS[0]), 1, "{url}");
    }
}

#[test]
fn no_mutation_shows_the_password() {
    logged::listen();
    listen_to_panics();
    static COUNTS: Mutex<(usize, usize)> = Mutex::new((0, 0));
    let config = ProptestConfig {
        cases: 400,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::default()
    };
    let urls = (0..URLS.len(), 0..PASSWORDS.len(), proptest::collection::vec(mutation(), 1..=3));
    proptest!(config, |((url, password, mutations) in urls)| {
        let password = PASSWORDS[password];
        let became_a_name = try_url(&mutated(&filled(URLS[url], password), &mutations), password);
        let mut counts = COUNTS.lock().unwrap();
        *counts = (counts.0 + 1, counts.1 + became_a_name);
    });
    let (tried, names) = *COUNTS.lock().unwrap();
    // Of most URLs something can be asked: few have become sound ones with the password in the place of a name.
    assert!(names * 20 < tried, "{names} of {tried}");
}
