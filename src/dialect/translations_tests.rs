//! Compares the translations in the library with the message catalogs of the installed servers. `scripts/translations`
//! generates the table again if a translation is missing.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use super::is_connection_lost;
use crate::error::ConnectErrorKind;
use crate::kind::DatabaseKind;
use crate::wording::phrase;
use ConnectErrorKind::{Authentication, NotPrimary, ServerFull, Starting, UnknownDatabase, Unreachable};
use diesel::result::{DatabaseErrorKind, Error};

const POSTGRES_CONNECT: &[(&str, ConnectErrorKind)] = &[
    ("password authentication failed for user \"%s\"", Authentication),
    ("Ident authentication failed for user \"%s\"", Authentication),
    ("Peer authentication failed for user \"%s\"", Authentication),
    ("LDAP authentication failed for user \"%s\"", Authentication),
    ("certificate authentication failed for user \"%s\"", Authentication),
    ("pg_hba.conf rejects connection for host \"%s\", user \"%s\", database \"%s\", %s", Authentication),
    ("no pg_hba.conf entry for host \"%s\", user \"%s\", database \"%s\", %s", Authentication),
    ("role \"%s\" does not exist", Authentication),
    ("role \"%s\" is not permitted to log in", Authentication),
    ("permission denied for database %s", Authentication),
    ("fe_sendauth: no password supplied\n", Authentication),
    ("database \"%s\" does not exist", UnknownDatabase),
    ("sorry, too many clients already", ServerFull),
    ("remaining connection slots are reserved for non-replication superuser connections", ServerFull),
    ("too many connections for role \"%s\"", ServerFull),
    ("too many connections for database \"%s\"", ServerFull),
    ("the database system is starting up", Starting),
    ("the database system is shutting down", Starting),
    ("the database system is in recovery mode", Starting),
    ("the database system is not accepting connections", Starting),
    ("session is read-only\n", NotPrimary),
    ("server is in hot standby mode\n", NotPrimary),
    ("timeout expired\n", Unreachable),
    ("could not translate host name \"%s\" to address: %s\n", Unreachable),
];

const POSTGRES_TRANSIENT: &[&str] = &[
    "deadlock detected",
    "could not serialize access due to concurrent update",
    "could not serialize access due to concurrent delete",
    "could not serialize access due to read/write dependencies among transactions",
];

const POSTGRES_LOST: &[&str] = &[
    "terminating connection due to administrator command",
    "terminating connection because of crash of another server process",
    "terminating connection due to idle-in-transaction timeout",
];

const MARIADB_TRANSIENT: &[&str] = &[
    "Deadlock found when trying to get lock; try restarting transaction",
    "Lock wait timeout exceeded; try restarting transaction",
    "Record has changed since last read in table '%-.192s'; try restarting transaction",
];

const MARIADB_CONNECT: &[(&str, ConnectErrorKind)] = &[
    ("Access denied for user '%s'@'%s' to database '%-.192s'", Authentication),
    ("Access denied for user '%s'@'%s' (using password: %s)", Authentication),
    ("Host '%-.64s' is not allowed to connect to this MariaDB server", Authentication),
    ("Unknown database '%-.192s'", UnknownDatabase),
    ("Too many connections", ServerFull),
    ("User %-.64s already has more than 'max_user_connections' active connections", ServerFull),
    ("Server shutdown in progress", Starting),
];

/// The message of a server for this format, with `shop` for each argument.
fn rendered(text: &str) -> String {
    let mut parts = text.split('%');
    let mut rendered = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(['s', 'd', 'u']).expect("a directive") + 1;
        rendered.push_str("shop");
        rendered.push_str(&part[end..]);
    }
    rendered
}

fn is_expected(kind: &str) -> bool {
    !std::env::var("DIESEL_SESSION_TEST_WITHOUT").unwrap_or_default().split(',').any(|without| without == kind)
}

/// The files with a matching name in `below` of the folders of `root`.
fn files(root: &str, name: impl Fn(&str) -> bool, below: &str) -> Vec<PathBuf> {
    let folders = fs::read_dir(root).into_iter().flatten().flatten();
    let files = folders.flat_map(|folder| fs::read_dir(folder.path().join(below)).into_iter().flatten().flatten());
    files
        .map(|file| file.path())
        .filter(|path| path.file_name().is_some_and(|file| name(&file.to_string_lossy())))
        .collect()
}

/// Reads a message catalog of GNU gettext.
fn catalog(path: &PathBuf) -> HashMap<String, String> {
    let bytes = fs::read(path).expect("readable");
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
    assert_eq!(number(0), 0x950412de, "{path:?}");
    let (count, originals, translations) = (number(8), number(12), number(16));
    let text = |table: usize, index: usize| {
        let (length, start) = (number(table + 8 * index), number(table + 8 * index + 4));
        String::from_utf8_lossy(&bytes[start..start + length]).into_owned()
    };
    (0..count).map(|index| (text(originals, index), text(translations, index))).collect()
}

fn error(message: String) -> Error {
    Error::DatabaseError(DatabaseErrorKind::Unknown, Box::new(message))
}

#[test]
fn dialect_recognises_errors_of_postgres_in_every_installed_language() {
    let catalogs = files(
        "/usr/share/locale",
        |name| (name.starts_with("postgres-") || name.starts_with("libpq5-")) && name.ends_with(".mo"),
        "LC_MESSAGES",
    );
    assert!(catalogs.len() > 10 || !is_expected("postgres"), "no message catalogs of PostgreSQL are installed");
    let english = |message: &str| (message.to_owned(), message.to_owned());
    let all = POSTGRES_CONNECT.iter().map(|(message, _)| *message).chain(POSTGRES_TRANSIENT.iter().copied());
    let english = all.chain(POSTGRES_LOST.iter().copied()).map(english).collect();
    let translated = catalogs.iter().map(|path| (path.display().to_string(), catalog(path)));
    let mut missing = Vec::new();
    for (name, catalog) in translated.chain([("English".to_owned(), english)]) {
        let translation =
            |message: &str| catalog.get(message).filter(|text| !text.is_empty()).map(|text| rendered(text));
        for (message, kind) in POSTGRES_CONNECT {
            let Some(text) = translation(message) else { continue };
            let text = format!("connection to server at \"127.0.0.1\", port 5432 failed: FATAL:  {text}");
            let found = DatabaseKind::Postgres.classify_connect_error(&phrase(&text));
            if found != *kind {
                missing.push(format!("{name}: {text}: {found:?}"));
            }
            // The message of a server whose locale has ASCII letters only.
            let masked = super::error_texts::mask(&text);
            let found = DatabaseKind::Postgres.classify_connect_error(&phrase(&masked));
            let must = ["password authentication", "role \"%s\" does", "database \"%s\" does"];
            let may_be_other = !must.iter().any(|start| message.starts_with(start));
            if found != *kind && (found != ConnectErrorKind::Other || !may_be_other) {
                missing.push(format!("{name}: {masked}: {found:?} and not {kind:?}"));
            }
        }
        for message in POSTGRES_TRANSIENT {
            let found = translation(message).is_none_or(|text| DatabaseKind::Postgres.is_transient(&error(text)));
            if !found {
                missing.push(format!("{name}: {message}"));
            }
        }
        for message in POSTGRES_LOST {
            if translation(message).is_some_and(|text| !is_connection_lost(&error(text))) {
                missing.push(format!("{name}: {message}"));
            }
        }
        let lock = translation("canceling statement due to lock timeout");
        if lock.is_some_and(|text| !DatabaseKind::Postgres.is_lock_timeout(&text)) {
            missing.push(format!("{name}: lock timeout"));
        }
        // The errors of other statements are not transient.
        for other in
            ["canceling statement due to statement timeout", "relation \"%s\" does not exist", "division by zero"]
        {
            let Some(text) = translation(other) else { continue };
            let taken = DatabaseKind::Postgres.is_transient(&error(text.clone()))
                || DatabaseKind::Postgres.is_lock_timeout(&text)
                || is_connection_lost(&error(text.clone()));
            assert!(!taken, "{name}: {text}");
        }
    }
    assert!(missing.is_empty(), "run scripts/translations:\n{}", missing.join("\n"));
}

#[test]
fn dialect_recognises_errors_of_mariadb_in_every_installed_language() {
    let mut files = files("/usr/share/mysql", |name| name == "errmsg.sys", "");
    files.sort();
    assert!(files.len() > 10 || !is_expected("mysql"), "no messages of MariaDB are installed");
    let texts = |path: &PathBuf| {
        let bytes = fs::read(path).expect("readable");
        let texts = bytes.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned());
        texts.collect::<Vec<_>>()
    };
    let Some(english) = files.iter().find(|path| path.to_string_lossy().contains("/english/")).map(texts) else {
        return;
    };
    let mut missing = Vec::new();
    for path in &files {
        let texts = texts(path);
        for (number, message) in MARIADB_TRANSIENT.iter().enumerate() {
            let from_end = english.len() - english.iter().position(|text| text == message).expect(message);
            let text = rendered(&texts[texts.len() - from_end]);
            let found = DatabaseKind::Mysql.is_transient(&error(text.clone()))
                && (number != 0 || DatabaseKind::Mysql.is_deadlock(&error(text.clone())))
                && (number != 1 || DatabaseKind::Mysql.is_lock_timeout(&text));
            if !found {
                missing.push(format!("{}: {text}", path.display()));
            }
        }
        for (message, kind) in MARIADB_CONNECT {
            let from_end = english.len() - english.iter().position(|text| text == message).expect(message);
            let text = phrase(rendered(&texts[texts.len() - from_end]));
            let found = DatabaseKind::Mysql.classify_connect_error(&text);
            if found != *kind {
                missing.push(format!("{}: {text}: {found:?}", path.display()));
            }
        }
    }
    assert!(missing.is_empty(), "run scripts/translations:\n{}", missing.join("\n"));
}
