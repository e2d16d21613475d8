//! Rules that hold for the text of every error.

use std::collections::BTreeSet;
use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::result::{DatabaseErrorKind, Error as DieselError};

use super::*;
use crate::url::Target;

fn place() -> SourceLocation {
    Location::caller()
}

/// A server as errors show it.
fn shown(url: &str) -> String {
    Target::parse(url, None).expect(url).shown
}

fn servers() -> [String; 3] {
    [shown("shop.sqlite"), shown("postgres://app@h/shop"), shown("mysql://app@h/shop")]
}

fn refused() -> DieselError {
    DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, Box::new("duplicate key".to_owned()))
}

fn undos() -> Vec<Undo> {
    let at = place();
    vec![
        Undo::NotNeeded,
        Undo::Unsaid,
        Undo::RolledBack,
        Undo::SavepointRolledBack,
        Undo::Rollback,
        Undo::Scope,
        Undo::Closure { name: "retry", at },
        Undo::ClosureThenRollback { name: "savepoint", at },
        Undo::Hook { name: "before_flush" },
    ]
}

fn holder() -> Holder {
    Holder::new("shop".into(), place(), Instant::now(), true)
}

fn some_holders() -> [Holders; 3] {
    [Holders::default(), Holders(vec![holder().snapshot()]), Holders(vec![holder()])]
}

fn failures() -> Vec<MigrationFailure> {
    let mut failures = Vec::new();
    for operation in ["create_all", "drop_all"] {
        for outcome in [MigrationOutcome::NotDone, MigrationOutcome::Done, MigrationOutcome::Unknown] {
            for bits in 0..32_u32 {
                let bit = |n: u32| bits & (1 << n) != 0;
                let list = |some: bool| if some { vec!["one".to_owned(), "two".to_owned()] } else { Vec::new() };
                let (kept, left) = (list(bit(0)), list(bit(1)));
                let failure = || MigrationFailure {
                    app: "shop".into(),
                    operation,
                    migration: if bit(3) { "2024_posts" } else { "the commit" }.into(),
                    message: "it says no.".into(),
                    done: kept.clone(),
                    left_behind: left.clone(),
                    outcome,
                    connection_lost: bit(2),
                    is_migration: bit(3),
                    excluded_others: bit(4),
                    of_test_database: false,
                    advice: None,
                };
                failures.extend([failure(), failure().in_test_database()]);
            }
        }
    }
    failures
}

fn unknown_commits() -> Vec<Error> {
    let resolvers = [
        Resolver::NothingWritten,
        Resolver::Silent("the database does not tell"),
        Resolver::Ask(Arc::new(|_| Ok(crate::session::CommitOutcome::Committed))),
    ];
    let error = |resolver| {
        let (app, at, verdict) = ("shop".into(), place(), Arc::default());
        Error::from(Details::CommitUnknown { app, at, source: refused(), resolver, verdict })
    };
    resolvers.into_iter().map(error).collect()
}

/// Errors of every variant, with empty lists and with the numbers 0, 1 and more.
fn all() -> Vec<Error> {
    let (at, app) = (place(), || "shop".to_owned());
    let waited = Duration::from_millis(1500);
    let query = || Error::from(Details::Query { source: refused(), at });
    let names = |some: bool| if some { vec!["one".to_owned(), "two".to_owned()] } else { Vec::new() };
    let mut all = unknown_commits();
    all.extend(failures().into_iter().map(|failure| Error::from(Details::Migration(failure))));
    for undo in undos() {
        for count in [0, 1, 2] {
            all.push(Error::from(Details::NotReturned { entity: "User", sent: count, returned: 3, at, undo }));
            all.push(Error::from(Details::UnresolvedKeys { entity: "User", rows: count.max(1), at, undo }));
        }
        for operation in ["SELECT", "UPDATE", "DELETE"] {
            all.push(Error::from(Details::NotUnique { entity: "User", key: "7".into(), operation, rows: 2, at, undo }));
        }
        for key in [None, Some("7".to_owned())] {
            all.push(Error::from(Details::RowTooLarge { entity: "User", key, bytes: 20, limit: 10, at, undo }));
        }
        for lost in [LostStatement::InTransaction, LostStatement::Read, LostStatement::Autocommitted] {
            all.push(Error::from(Details::ConnectionLost { app: app(), at, lost, source: refused(), undo }));
        }
        all.push(Error::from(Details::Stale { entity: "User", key: "7".into(), operation: "update", at, undo }));
        all.push(Error::from(Details::UnmatchedRows { entity: "User", at, undo }));
        all.push(Error::from(Details::Autoflush { source: query(), at, undo }));
    }
    for pool in [PoolOf::Program, PoolOf::Test, PoolOf::RolledBackTest] {
        for limit in [WaitLimit::Acquire, WaitLimit::Connect, WaitLimit::Scope, WaitLimit::Call] {
            for holders in some_holders() {
                for waiting in [0, 1, 2] {
                    let (max_size, holders) = (waiting as u32 + 1, holders.clone());
                    for connecting_for in [None, Some(waited)] {
                        let (app, holders) = (app(), holders.clone());
                        all.push(Error::from(Details::AcquireTimeout {
                            app,
                            waited,
                            max_size,
                            connecting_for,
                            waiting,
                            holders,
                            at,
                            limit,
                            pool,
                        }));
                    }
                }
                let holders = || holders.clone();
                for max_connections in [1, 2] {
                    let holders = holders();
                    all.push(Error::from(Details::ConnectionLimitReached {
                        app: app(),
                        waited,
                        max_connections,
                        holders,
                        at,
                        limit,
                    }));
                }
                for short in [Shortage::Pool, Shortage::Limit, Shortage::TestConnection, Shortage::WriteLock] {
                    all.push(Error::from(Details::WouldDeadlock { app: app(), short, holders: holders(), at, pool }));
                }
            }
            for server in servers() {
                for connecting in [None, Some(2 * waited)] {
                    for is_pooled in [false, true] {
                        let (app, server) = (app(), server.clone());
                        let details = Details::ConnectTimeout { app, server, waited, connecting, at, limit, is_pooled };
                        all.push(Error::from(details));
                    }
                }
            }
        }
    }
    for server in servers() {
        for kind in [
            ConnectErrorKind::Authentication,
            ConnectErrorKind::Other,
            ConnectErrorKind::ServerFull,
            ConnectErrorKind::NotPrimary,
            ConnectErrorKind::Starting,
            ConnectErrorKind::UnknownDatabase,
            ConnectErrorKind::Unreachable,
        ] {
            for message in ["it says no.", "too many connections for role \"app\"", "give `Database::connect_with`"] {
                all.push(Error::from(Details::Connect {
                    app: app(),
                    server: server.clone(),
                    kind,
                    message: message.into(),
                    at,
                }));
            }
        }
    }
    for operation in ["create_all", "drop_all", A_READ, A_WRITE, "a statement", "a commit"] {
        for blockers in [Blockers::default(), Blockers::unknown("another process")] {
            let (message, left) = ("busy".to_owned(), "Nothing was changed.".to_owned());
            all.push(Error::from(Details::LockTimeout { app: app(), operation, waited, message, blockers, left, at }));
        }
    }
    for operation in ["commit", "rollback", "remove"] {
        for outer in ["transaction", "savepoint", "retry"] {
            all.push(Error::from(Details::InsideTransaction { operation, outer, outer_at: at, at }));
        }
    }
    for hook in
        ["before_flush", "before_commit", "before_commit_of_changes", "after_commit", "after_rollback", "on_checkout"]
    {
        for committed in [false, true] {
            all.push(Error::from(Details::HookFailed { hook, committed, message: "it says no.".into() }));
        }
    }
    for (unknown, irreversible) in [(false, true), (true, false), (true, true)] {
        all.push(Error::from(Details::NotReversible {
            app: app(),
            unknown: names(unknown),
            irreversible: names(irreversible),
        }));
    }
    for some in [false, true] {
        let database = "the `Database<PgConnection>`".to_owned();
        all.push(Error::from(Details::UnknownApp { app: app(), database, at, known: names(some) }));
        all.push(Error::from(Details::NotFound { row: some.then(|| "User 7".into()), at }));
        all.push(Error::from(Details::ForeignHandle { entity: "User", key: some.then(|| "7".into()), at }));
        all.push(Error::from(Details::WriteInProgress {
            entity: "User",
            key: some.then(|| "7".into()),
            held_at: at,
            at,
        }));
        all.push(Error::from(Details::TestInvalidated {
            app: app(),
            cause: "`COMMIT` was sent".into(),
            at: some.then_some(at),
        }));
        all.push(Error::from(Details::TestInvalidated {
            app: app(),
            cause: crate::error::LOST.into(),
            at: some.then_some(at),
        }));
        let connecting = usize::from(some);
        for still_out in some_holders() {
            let apps = if some { names(true) } else { vec![app()] };
            let report = DisposeReport { apps, closed: connecting, waited, still_out, connecting };
            all.push(Error::from(Details::StillInUse(report)));
        }
    }
    for holders in some_holders().into_iter().filter(|holders| !holders.is_empty()) {
        all.push(Error::from(Details::TransactionOpen { app: app(), operation: "drop_all", holders }));
    }
    for state in [
        RowState::Pending,
        RowState::Persistent,
        RowState::Expired,
        RowState::RolledBack,
        RowState::Deleted,
        RowState::Discarded,
        RowState::Detached,
        RowState::Undecided,
    ] {
        for operation in ["read", "written", "deleted", "refreshed", "expired", "expunged"] {
            all.push(Error::from(Details::WrongState { entity: "User", key: None, state, operation, at }));
        }
    }
    for inside in [None, Some("retry"), Some("savepoint"), Some("transaction")] {
        all.push(Error::from(Details::NotRepeatable { inside, since: at, at }));
    }
    for source in unknown_commits().into_iter().chain([query()]) {
        for committed in [vec!["shop".to_owned()], names(true)] {
            let source = match &source {
                _ if source.is_commit_unknown() => unknown_commits().remove(0),
                _ => query(),
            };
            all.push(Error::from(Details::PartialCommit { committed, failed: "audit".into(), source }));
        }
    }
    let poisoned = crate::dialect::with_poison_advice(refused(), crate::dialect::Poison::Outdated);
    all.extend([
        query(),
        Error::from(Details::Query { source: poisoned, at }),
        Error::from(Details::AlreadyBegun { begun_at: at, at }),
        Error::from(Details::AlreadyFlushing { at }),
        Error::from(Details::AlreadyRegistered { app: app() }),
        Error::from(Details::DatabaseAdmin {
            database: "shop".into(),
            problem: DatabaseProblem::Exists,
            detail: String::new(),
        }),
        Error::from(Details::DeadlineExceeded { limit: waited, at }),
        Error::from(Details::Disposed { app: app(), how: AppEnd::Disposed }),
        Error::from(Details::Disposed { app: app(), how: AppEnd::Removed }),
        Error::from(Details::Disposed { app: app(), how: AppEnd::TestEnded }),
        Error::from(Details::Forked { app: app() }),
        Error::from(Details::InvalidConfig { app: app(), reason: "max_size is 0; it takes 1 to 10,000".into() }),
        Error::from(Details::InvalidConfig {
            app: NO_APP.into(),
            reason: "the environment variable X is not set.".into(),
        }),
        Error::from(Details::KeyChanged { entity: "User", from: "1".into(), to: "2".into(), at }),
        Error::from(Details::NoContext { at }),
        Error::from(Details::NoMigrations { app: app(), backend: "PostgreSQL" }),
        Error::from(Details::UnmanagedDatabase {
            database: "shop".into(),
            advice: "give its name as the last argument",
        }),
        Error::from(Details::PoolerInTransactionMode {
            app: app(),
            operation: "create_all",
            detail: "Nothing was changed.".into(),
        }),
        Error::from(Details::RollbackRequired { cause: "duplicate key.".into(), at }),
        Error::from(Details::SchemaProtected { app: app(), database: "shop".into(), at }),
        Error::from(Details::SessionBusy { held_at: at, at }),
        Error::from(Details::SessionEnded { app: app(), at }),
        Error::from(Details::TestLeftovers { who: "test `t`".into(), left: names(true) }),
        Error::from(Details::TestSetup { test: "t".into(), what: "making a database", reason: "no right.".into() }),
        Error::from(Details::TooManyRows { at }),
    ]);
    all
}

fn known_codes() -> BTreeSet<&'static str> {
    let source = include_str!("kind.rs");
    source.match_indices("\"DS").map(|(at, _)| &source[at + 1..at + 6]).collect()
}

#[test]
fn error_text_consists_of_whole_sentences() {
    for error in all() {
        let text = error.to_string();
        assert!(text.starts_with(&format!("{} ", error.code())), "{text}");
        let is_list = error.kind() == ErrorKind::TestLeftovers;
        assert!(is_list || text.ends_with('.') && !text.ends_with("..") && !text.contains('\n'), "{text}");
        let prose: String =
            text.split('`').enumerate().map(|(n, part)| if n % 2 == 0 { part } else { "code" }).collect();
        for wrong in ["  ", " .", " ,", "..)..", ".. ", "[]", ":.", ": .", ": ,", "by .", ",.", ";.", " ()", "nobody"] {
            assert!(!prose.contains(wrong), "`{wrong}` in: {text}");
        }
        let sentences: Vec<&str> = text.split(". ").map(|sentence| sentence.trim_end_matches('.')).collect();
        let different: BTreeSet<&str> = sentences.iter().copied().collect();
        assert_eq!(sentences.len(), different.len(), "a sentence comes twice: {text}");
        for sentence in &sentences[1..] {
            let first = sentence.chars().next();
            let is_name = ["create_all", "drop_all"].iter().any(|name| sentence.starts_with(name));
            assert!(is_name || first.is_some_and(|c| c.is_uppercase() || c == '`'), "`{sentence}` in: {text}");
        }
        for plural in ["1 new rows", "1 connections", "1 other callers", "1 connects", "all 1 ", "all its 1 "] {
            assert!(!text.contains(plural), "{text}");
        }
        assert!(text.matches("`rollback()`").count() <= 1, "advice comes twice: {text}");
    }
}

#[test]
fn every_error_code_is_tested_and_in_the_reference() {
    let known = known_codes();
    let seen: BTreeSet<&str> = all().iter().map(Error::code).collect();
    assert_eq!(seen, known);
    let reference = include_str!("reference.md");
    let documented: BTreeSet<&str> =
        reference.match_indices("| DS").map(|(at, _)| &reference[at + 2..at + 7]).collect();
    assert_eq!(documented, known);
    assert!(reference.lines().filter(|line| line.starts_with("| DS")).all(|line| line.split('|').count() == 6));
}

fn connect_text(url: &str, kind: ConnectErrorKind, message: &str) -> String {
    Error::from(Details::Connect { app: "shop".into(), server: shown(url), kind, message: message.into(), at: place() })
        .to_string()
}

#[test]
fn server_full_advice_distinguishes_the_account_limit() {
    let text = |url: &str, message: &str| connect_text(url, ConnectErrorKind::ServerFull, message);
    for (url, message) in [
        ("postgres://app@h/shop", "FATAL: too many connections for role \"app\""),
        ("postgres://app@h/shop", "FATAL: zu viele Verbindungen von Rolle »app«"),
        ("postgres://app@h/shop", "FATAL: too many connections for database \"shop\""),
        ("mysql://app@h/shop", "User app already has more than 'max_user_connections' active connections"),
    ] {
        let text = text(url, message);
        assert!(text.contains("that of the account") && !text.contains("max_connections."), "{text}");
    }
    for (url, message) in [
        ("postgres://app@h/shop", "FATAL: sorry, too many clients already"),
        ("postgres://app@h/shop", "FATAL: tut mir leid, schon zu viele Verbindungen"),
        ("mysql://app@h/shop", "Too many connections"),
    ] {
        let text = text(url, message);
        assert!(text.ends_with("raise the server's max_connections.") && !text.contains("account"), "{text}");
    }
}

#[test]
fn deadlock_advice_depends_on_the_holders() {
    let error = |waits_for_same_resource: bool, is_caller: bool| {
        let holders = Holders((0..2).map(|_| Holder { waits_for_same_resource, is_caller, ..holder() }).collect());
        let (short, pool) = (Shortage::Pool, PoolOf::Program);
        Error::from(Details::WouldDeadlock { app: "shop".into(), short, holders, at: place(), pool })
    };
    let of_one_pool = error(true, false);
    let advice = "Let each thread hold one connection at a time, or raise `Config::max_size`.";
    assert!(of_one_pool.to_string().ends_with(advice), "{of_one_pool}");
    let of_several = error(false, false);
    let advice = "Take connections in the same order everywhere, or raise `Config::max_size`.";
    assert!(of_several.to_string().ends_with(advice), "{of_several}");
    assert!(of_one_pool.is_transient() && of_several.is_transient());
    let own = error(true, true);
    let advice = "Commit the outer session first, do both in one, or raise `Config::max_size`.";
    assert!(own.to_string().ends_with(advice), "{own}");
    assert!(!own.is_transient());
}

#[test]
fn disposed_text_names_the_end_of_the_application() {
    let text = |how| Error::from(Details::Disposed { app: "shop".into(), how }).to_string();
    let (disposed, removed, ended) = (text(AppEnd::Disposed), text(AppEnd::Removed), text(AppEnd::TestEnded));
    assert!(
        disposed.contains("was disposed of") && !disposed.contains("remove") && !disposed.contains("test"),
        "{disposed}"
    );
    assert!(removed.contains("`init_app`") && !removed.contains("dispose") && !removed.contains("test"), "{removed}");
    assert!(ended.contains("its test") && !ended.contains("dispose") && !ended.contains("remove"), "{ended}");
}

/// The thread that reads an error may be another one than the thread that got it.
#[test]
fn deadlock_text_is_the_same_in_every_thread() {
    let holders = Holders(vec![holder().snapshot()]);
    let (short, pool) = (Shortage::Pool, PoolOf::Program);
    let error = Error::from(Details::WouldDeadlock { app: "shop".into(), short, holders, at: place(), pool });
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(error.to_string().contains("because this thread itself holds"), "{error}"));
    });
}

#[test]
fn failed_on_connect_advice_names_its_source() {
    for kind in [ConnectErrorKind::Other, ConnectErrorKind::Authentication, ConnectErrorKind::UnknownDatabase] {
        let text =
            connect_text("postgres://app@h/shop", kind, "`Config::connection_init_sql` failed: no (at `SET a = 1`)");
        assert!(text.ends_with("(at `SET a = 1`). Correct the SQL of `Config::connection_init_sql`."), "{text}");
        let text = connect_text("mysql://app@h/shop", kind, "`Database::on_connect` failed: no");
        assert!(text.ends_with("failed: no. Correct the function given to `Database::on_connect`."), "{text}");
    }
}

#[test]
fn connect_failure_of_unknown_kind_has_no_advice() {
    for (url, message) in [
        ("postgres://app@h/shop", "connecting panicked: no"),
        ("postgres://app@h/shop", "server does not support SSL, but SSL was required"),
        ("postgres://app@h/shop", "invalid URI query parameter: \"sllmode\""),
        ("shop.sqlite", "file is not a database"),
    ] {
        let text = connect_text(url, ConnectErrorKind::Other, message);
        assert!(text.ends_with(&format!(": {message}.")), "{text}");
    }
}

#[test]
fn advice_fits_the_database_and_the_pool() {
    for error in all() {
        let text = error.to_string();
        if text.contains("SQLite shop.sqlite") {
            for server_only in ["that the server runs", "pg_hba", "that it runs", "accepts connections"] {
                assert!(!text.contains(server_only), "{text}");
            }
        }
        if let Details::Connect { server, kind: ConnectErrorKind::Authentication, .. } = error.details() {
            assert_eq!(text.contains("pg_hba"), server.starts_with("PostgreSQL "), "{text}");
        }
        if let Details::AcquireTimeout { pool: PoolOf::RolledBackTest, .. } = error.details() {
            assert!(!text.contains("max_size") && text.contains("TestIsolation::Database"), "{text}");
        }
        if let Details::Migration(failure) = error.details() {
            let kept = ["Undo that by hand", "undo by hand", "kept", "The database keeps"];
            assert!(!failure.of_test_database || kept.iter().all(|kept| !text.contains(kept)), "{text}");
            assert!(failure.excluded_others || !text.contains("by hand"), "{text}");
        }
        if let Details::PartialCommit { source, .. } = error.details() {
            assert_eq!(
                source.is_commit_unknown(),
                text.contains("it is not known whether audit was committed"),
                "{text}"
            );
        }
    }
}

#[test]
fn error_is_one_pointer() {
    assert_eq!(size_of::<Error>(), size_of::<usize>());
    assert_eq!(size_of::<Option<Error>>(), size_of::<usize>());
}

#[test]
fn error_display_does_not_repeat_its_source_and_the_alternate_form_adds_it() {
    for error in all() {
        let Some(source) = std::error::Error::source(&error).map(ToString::to_string) else { continue };
        let (text, whole) = (error.to_string(), format!("{error:#}"));
        assert!(!text.contains(&source), "{text}");
        assert!(whole.starts_with(&text) && whole.contains(&format!(" Cause: {source}")), "{whole}");
        assert!(whole.ends_with('.') && !whole.ends_with(".."), "{whole}");
    }
}

#[test]
fn error_debug_shows_the_kind_the_text_and_the_source() {
    let error = Error::from(refused());
    let shown = format!("{error:?}");
    for part in
        ["kind: Query", "message: \"DS302 the statement", "source: DatabaseError(UniqueViolation, \"duplicate key"]
    {
        assert!(shown.contains(part), "{shown}");
    }
}

/// Each text has a location or an application if the error has one.
#[test]
fn error_accessors_agree_with_the_text() {
    for error in all() {
        let text = error.to_string();
        assert_eq!(error.code(), error.kind().code());
        if let Some(at) = error.location().filter(|_| error.kind() != ErrorKind::PartialCommit) {
            assert!(text.contains(&at.to_string()), "{text}");
        }
        if let Some(app) = error.app().filter(|_| text.contains("app `")) {
            assert!(text.contains(app), "{text}");
        }
        if let Some(entity) = error.entity() {
            assert!(format!("{error:#}").contains(entity), "{text}");
        }
        if let Some(state) = error.row_state() {
            assert_eq!(error.kind(), ErrorKind::WrongState, "{state:?}: {text}");
        }
    }
}
