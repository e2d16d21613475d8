//! What a context logs if it ends with changes that nobody has committed or rolled back.

use diesel_session::testing::{TestIsolation, TestSetup, run};

use super::*;
use crate::blog;
use crate::fixtures::logged;

/// What every such warning says.
const FORGOTTEN: &str = "because nothing has committed them";

/// The rest of such a warning.
const ADVICE: &str =
    ". Call `commit()`, enter the context with `App::run`, or discard the changes on purpose with `Scope::discard()`";

/// The warnings about the application that `body` causes, without their common part.
#[track_caller]
fn warnings(app: &App<Conn>, body: impl FnOnce()) -> Vec<String> {
    logged::listen();
    let before = logged::count();
    body();
    let start = format!(
        "WARN diesel_session::session app `{}` on {}: changes of the context entered at ",
        app.id(),
        app.url_shown()
    );
    let about = logged::lines_since(before).into_iter().filter(|line| line.contains(FORGOTTEN));
    about
        .filter_map(|line| {
            let rest = line.strip_prefix(&start)?;
            Some(rest.strip_suffix(ADVICE).unwrap_or_else(|| panic!("{line}")).to_owned())
        })
        .collect()
}

/// `body` causes one warning.
#[track_caller]
fn assert_warns(app: &App<Conn>, what: &str, body: impl FnOnce()) {
    let warnings = warnings(app, body);
    assert!(warnings.len() == 1, "{what}: {warnings:?}");
}

/// `body` causes no warning.
#[track_caller]
fn assert_silent(app: &App<Conn>, what: &str, body: impl FnOnce()) {
    let warnings = warnings(app, body);
    assert!(warnings.is_empty(), "{what}: {warnings:?}");
}

fn here(line: u32) -> String {
    format!("{}:{line}:", file!())
}

/// Without the columns.
fn lines_of(warning: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    for word in warning.split(' ') {
        let (place, comma) = word.strip_suffix([',', ':']).map_or((word, ""), |place| (place, &word[place.len()..]));
        match place.rsplit_once(':') {
            Some((place, _)) if place.contains(".rs:") => words.push(format!("{place}:{comma}")),
            _ => words.push(word.to_owned()),
        }
    }
    words.join(" ")
}

const INSERT: &str = "INSERT INTO users (name) VALUES ('Ada')";

#[test]
fn a_forgotten_commit_is_one_warning_with_its_locations() {
    test(|shop| {
        let first = line!();
        let warnings = warnings(shop, || {
            let added = shop.context(|| {
                add(&DB.session()?, "Ada")?;
                add(&DB.session()?, "Bob")
            });
            assert_is!(added, Ok(1));
        });
        let (entered, begun) = (here(first + 2), here(first + 3));
        assert_eq!(
            warnings.iter().map(|line| lines_of(line)).collect::<Vec<_>>(),
            [format!("{entered} are rolled back, {FORGOTTEN}: their transaction began at {begun}")]
        );
        assert!(shop.names().is_empty());
        shop.assert_at_rest();
        Ok(())
    });
}

#[test]
fn the_warning_names_the_first_write_of_a_transaction_that_began_with_a_read() {
    test(|shop| {
        let first = line!();
        let warnings = warnings(shop, || {
            let added = shop.context(|| {
                names(&DB.session()?)?;
                add(&DB.session()?, "Ada")
            });
            assert_is!(added, Ok(1));
        });
        let (entered, read, wrote) = (here(first + 2), here(first + 3), here(first + 4));
        let began = match KIND {
            // The read runs outside of the transaction.
            Kind::Sqlite | Kind::Postgres => format!("began at {wrote}"),
            Kind::Mariadb => format!("began at {read} and has written since {wrote}"),
        };
        assert_eq!(
            warnings.iter().map(|line| lines_of(line)).collect::<Vec<_>>(),
            [format!("{entered} are rolled back, {FORGOTTEN}: their transaction {began}")]
        );
        Ok(())
    });
}

#[test]
fn the_warning_names_the_first_change_that_was_not_flushed() {
    test_on(Fixture::sql("blog", blog::tables(KIND)), |shop| {
        let first = line!();
        let warnings = warnings(shop, || {
            shop.enter(|| {
                let session = DB.session().expect("a session");
                session.add(blog::NewWriter { name: "Ada".into(), email: None }).expect("a session");
                session.add(blog::NewWriter { name: "Bob".into(), email: None }).expect("a session");
            });
        });
        let (entered, changed) = (here(first + 2), here(first + 4));
        assert_eq!(
            warnings.iter().map(|line| lines_of(line)).collect::<Vec<_>>(),
            [format!(
                "{entered} are rolled back, {FORGOTTEN}: they are not flushed, and the first was made at {changed}"
            )]
        );
        Ok(())
    });
}

#[test]
fn every_kind_of_write_is_noticed() {
    test_on(Fixture::sql("blog", blog::tables(KIND)), |shop| {
        let ada = || diesel::insert_into(users::table).values(users::name.eq("Ada"));
        shop.run(|| add(&DB.session()?, "Eve"))?;
        type Write<'w> = (&'w str, &'w dyn Fn(&Session<Conn>) -> Result<()>);
        let writes: &[Write<'_>] = &[
            ("insert", &|session| session.execute(ada()).map(drop)),
            ("update", &|session| session.execute(diesel::update(users::table).set(users::age.eq(1))).map(drop)),
            ("delete", &|session| session.execute(diesel::delete(users::table)).map(drop)),
            ("with", &|session| session.with(|conn| ada().execute(conn)).map(drop)),
            ("raw", &|session| session.execute(sql_query(INSERT)).map(drop)),
            ("batch", &|session| raw(session, &format!("SELECT 1; {INSERT}; SELECT 2"))),
            ("guard", &|session| {
                let mut conn = session.connection()?;
                ada().execute(&mut *conn)?;
                Ok(())
            }),
            ("with, in a transaction of Diesel", &|session| {
                session.with(|conn| conn.transaction(|conn| ada().execute(conn))).map(drop)
            }),
            ("before a savepoint of Diesel that is rolled back", &|session| {
                session.with(|conn| {
                    ada().execute(conn)?;
                    let undone = conn.transaction(|conn| {
                        diesel::delete(users::table).execute(conn)?;
                        Err::<(), _>(diesel::result::Error::RollbackTransaction)
                    });
                    assert!(undone.is_err());
                    Ok(())
                })
            }),
            ("in a savepoint", &|session| session.savepoint(|session| session.execute(ada()).map(drop))),
            ("before a savepoint that is rolled back", &|session| {
                session.execute(ada())?;
                let undone: Result<()> = session.savepoint(|session| {
                    add(session, "Bob")?;
                    DB.app("unknown").map(drop)
                });
                assert!(undone.is_err());
                Ok(())
            }),
            ("flushed", &|session| {
                session.add(blog::NewWriter { name: "Ada".into(), email: None })?;
                session.flush()
            }),
            ("not flushed", &|session| {
                session.add(blog::NewWriter { name: "Ada".into(), email: None })?;
                Ok(())
            }),
            ("after a commit", &|session| {
                session.execute(ada())?;
                session.rollback()?;
                session.commit()?;
                session.execute(ada()).map(drop)
            }),
            ("begun", &|session| {
                session.begin()?;
                session.execute(ada()).map(drop)
            }),
        ];
        for (what, write) in writes {
            assert_warns(shop, what, || {
                shop.context(|| write(&DB.session()?)).unwrap_or_else(|error| panic!("{what}: {error}"));
            });
        }
        assert_eq!(shop.names(), ["Eve"]);
        Ok(())
    });
}

#[test]
fn reads_and_finished_work_log_nothing() {
    test_on(Fixture::sql("blog", blog::tables(KIND)), |shop| {
        shop.run(|| {
            add(&DB.session()?, "Eve")?;
            DB.session()?.add(blog::NewWriter { name: "Eve".into(), email: None })?;
            Ok(())
        })?;
        type Body<'b> = (&'b str, &'b dyn Fn(&Session<Conn>) -> Result<()>);
        let bodies: &[Body<'_>] = &[
            ("nothing", &|_| Ok(())),
            ("typed SELECT", &|session| names(session).map(drop)),
            ("count and exists", &|session| {
                session.exists(users::table)?;
                session.count(users::table).map(drop)
            }),
            ("begun and read", &|session| {
                session.begin()?;
                names(session).map(drop)
            }),
            ("raw SELECT", &|session| {
                session.load::<Value>(sql_query("SELECT name AS value FROM users WHERE name <> 'DELETE'")).map(drop)
            }),
            ("raw batch of SELECTs", &|session| raw(session, "SELECT 1; SELECT 'INSERT INTO users'")),
            ("with, a SELECT", &|session| session.with(|conn| users::table.count().get_result::<i64>(conn)).map(drop)),
            ("WITH", &|session| raw(session, "WITH a AS (SELECT 1 AS b) SELECT b FROM a")),
            ("savepoint that reads", &|session| session.savepoint(|session| names(session).map(drop))),
            ("guard that reads", &|session| {
                let mut conn = session.connection()?;
                users::table.count().get_result::<i64>(&mut *conn)?;
                Ok(())
            }),
            ("read rows", &|session| session.track::<blog::Writer>(blog::writers::table).map(drop)),
            ("a row that was written with its own value", &|session| {
                let rows = session.track::<blog::Writer>(blog::writers::table)?;
                let name = rows[0].read().name.clone();
                rows[0].write().name = name;
                Ok(())
            }),
            ("a change that was taken back", &|session| {
                session.add(blog::NewWriter { name: "Ada".into(), email: None })?;
                session.expunge_all();
                Ok(())
            }),
            ("committed", &|session| {
                session.execute(diesel::update(users::table).set(users::age.eq(1)))?;
                session.commit()?;
                names(session).map(drop)
            }),
            ("rolled back", &|session| {
                add(session, "Ada")?;
                session.rollback()
            }),
            ("removed", &|session| {
                add(session, "Ada")?;
                session.remove()
            }),
            ("transaction", &|session| {
                session.transaction(|session| {
                    session.execute(diesel::update(users::table).set(users::age.eq(2))).map(drop)
                })
            }),
            ("transaction that fails", &|session| {
                let undone: Result<()> = session.transaction(|session| {
                    add(session, "Ada")?;
                    DB.app("unknown").map(drop)
                });
                assert!(undone.is_err());
                Ok(())
            }),
            ("savepoint that fails", &|session| {
                let undone: Result<()> = session.savepoint(|session| {
                    add(session, "Ada")?;
                    raw(session, "INSERT INTO users (name) VALUES ('Bob')")?;
                    DB.app("unknown").map(drop)
                });
                assert!(undone.is_err());
                Ok(())
            }),
            ("transactions of Diesel that fail", &|session| {
                session.with(|conn| {
                    let undone = conn.transaction(|conn| {
                        conn.batch_execute(INSERT)?;
                        let undone = conn.transaction(|conn| {
                            conn.batch_execute("INSERT INTO users (name) VALUES ('Bob')")?;
                            Err::<(), _>(diesel::result::Error::RollbackTransaction)
                        });
                        assert!(undone.is_err());
                        Err::<(), _>(diesel::result::Error::RollbackTransaction)
                    });
                    assert!(undone.is_err());
                    Ok(())
                })
            }),
            ("raw savepoint that is rolled back", &|session| {
                session.execute(sql_query("SAVEPOINT a"))?;
                add(session, "Ada")?;
                session.execute(sql_query("ROLLBACK TO SAVEPOINT a"))?;
                names(session).map(drop)
            }),
            ("retry", &|session| {
                session.retry(2, |session| {
                    session.execute(diesel::update(users::table).set(users::age.eq(3)))?;
                    Ok::<_, Error>(())
                })
            }),
            ("statement that fails", &|session| {
                let twice = session.savepoint(|session| add(session, "Eve"));
                assert!(twice.is_err());
                Ok(())
            }),
        ];
        for (what, body) in bodies {
            assert_silent(shop, what, || {
                shop.context(|| body(&DB.session()?)).unwrap_or_else(|error| panic!("{what}: {error}"));
                shop.enter(|| body(&DB.session()?)).unwrap_or_else(|error| panic!("{what}: {error}"));
            });
            // A request that only reads is silent in each kind of scope.
            if what.contains("SELECT") {
                for scope in [shop.scope().read_only(), shop.scope().autocommit(), shop.scope()] {
                    assert_silent(shop, what, || {
                        scope.run(|| body(&DB.session()?)).unwrap_or_else(|error| panic!("{what}: {error}"));
                    });
                }
            }
        }
        assert_eq!(shop.names(), ["Eve"]);
        Ok(())
    });
}

#[test]
fn each_verb_warns_exactly_if_the_program_may_have_forgotten_something() {
    test(|shop| {
        let ok = || add(&DB.session()?, "Ada");
        let err = || -> Result<usize> {
            add(&DB.session()?, "Ada")?;
            DB.app("unknown").map(|_| 0)
        };
        assert_warns(shop, "context", || drop(shop.context(ok)));
        assert_silent(shop, "context with an error", || drop(shop.context(err)));
        // The type of its result says nothing.
        assert_warns(shop, "enter", || drop(shop.enter(ok)));
        assert_warns(shop, "enter with an error", || drop(shop.enter(err)));
        assert_warns(shop, "scope", || drop(shop.scope().run(ok)));
        assert_silent(shop, "scope with an error", || drop(shop.scope().run(err)));
        assert_silent(shop, "scope that discards", || drop(shop.scope().discard().run(ok)));
        assert_silent(shop, "run with an error", || drop(shop.run(err)));
        assert_silent(shop, "scope with a commit and an error", || drop(shop.scope().run_and_commit(err)));
        assert_silent(shop, "scope that decides not to commit", || {
            assert_is!(shop.scope().run_and_commit_if(|_| false, ok), Ok(1));
        });
        for enter in [
            |shop: &Shop<Conn>| drop(shop.context(panic_after_write)),
            |shop: &Shop<Conn>| drop(shop.run(panic_after_write)),
        ] {
            assert_silent(shop, "a panic", || assert_eq!(panic_of(|| enter(shop)), "on purpose"));
        }
        assert!(shop.names().is_empty());
        assert_silent(shop, "run", || assert_is!(shop.run(ok), Ok(1)));
        assert_silent(shop, "run_and_commit", || {
            assert_is!(shop.scope().run_and_commit(|| add(&DB.session()?, "Bob")), Ok(1));
        });
        assert_silent(shop, "run_and_commit_if", || {
            assert_is!(shop.scope().run_and_commit_if(|rows| *rows == 1, || add(&DB.session()?, "Cid")), Ok(1));
        });
        assert_eq!(shop.names(), ["Ada", "Bob", "Cid"]);
        Ok(())
    });
}

fn panic_after_write() -> Result<()> {
    add(&DB.session()?, "by a panic")?;
    panic!("on purpose")
}

#[test]
fn a_commit_that_fails_is_an_error_and_no_warning() {
    test(|shop| {
        assert_silent(shop, "a hook that refuses", || {
            let refused = shop.run(|| {
                let session = DB.session()?;
                session.before_commit(|| DB.app("unknown").map(drop))?;
                add(&session, "Ada")
            });
            assert_error!(&refused, UnknownApp);
        });
        // What a hook writes after the commit is in a transaction that nobody commits.
        assert_warns(shop, "a hook that writes after the commit", || {
            let added = shop.run(|| {
                let session = DB.session()?;
                session.after_commit(|| drop(add(&DB.session().expect("a session"), "Bob")))?;
                add(&session, "Ada")
            });
            assert_is!(added, Ok(1));
        });
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

#[test]
fn a_nested_context_warns_of_its_own_changes() {
    test(|shop| {
        let first = line!();
        let warnings = warnings(shop, || {
            let outcome = shop.run(|| {
                // It is another session, so the commit of the outer context does not commit its work.
                shop.context(|| raw(&DB.session()?, "DELETE FROM users WHERE id = 0; SELECT 1"))?;
                add(&DB.session()?, "Ada")
            });
            assert_is!(outcome, Ok(1));
        });
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].starts_with(&here(first + 4)), "{warnings:?}");
        // The inner one is committed by itself, whatever becomes of the outer one.
        assert_silent(shop, "an inner run", || {
            let outcome: Result<()> = shop.run(|| {
                shop.run(|| add(&DB.session()?, "Bob"))?;
                DB.app("unknown").map(drop)
            });
            assert_error!(&outcome, UnknownApp);
        });
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}

#[test]
fn an_autocommit_scope_warns_only_of_changes_that_were_not_committed() {
    test_on(Fixture::sql("blog", blog::tables(KIND)), |shop| {
        let scope = || shop.scope().autocommit();
        assert_silent(shop, "statements", || {
            let done = scope().run(|| {
                let session = DB.session()?;
                add(&session, "Ada")?;
                raw(&session, "INSERT INTO users (name) VALUES ('Bob')")?;
                session.with(|conn| diesel::update(users::table).set(users::age.eq(1)).execute(conn))?;
                session.add(blog::NewWriter { name: "Ada".into(), email: None })?;
                session.flush()
            });
            assert_is!(done, Ok(()));
        });
        assert_warns(shop, "a row that was not flushed", || {
            let done = scope().run(|| {
                DB.session()?.add(blog::NewWriter { name: "Bob".into(), email: None })?;
                Ok::<_, Error>(())
            });
            assert_is!(done, Ok(()));
        });
        assert_warns(shop, "a transaction", || {
            let done = scope().run(|| {
                DB.session()?.begin()?;
                add(&DB.session()?, "Cid")
            });
            assert_is!(done, Ok(1));
        });
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}

#[test]
fn two_databases_with_forgotten_changes_are_one_warning() {
    test(|shop| {
        let audit = Shop::open(&AUDIT, Kind::Sqlite);
        AUDIT.init_app(shop.id(), Config::new(audit.url()))?;
        let warnings = warnings(shop, || {
            let added = shop.context(|| {
                add(&DB.session()?, "Ada")?;
                AUDIT.session()?.execute(diesel::insert_into(users::table).values(users::name.eq("Bob")))
            });
            assert_is!(added, Ok(1));
        });
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("and so are those of 1 more of its databases"), "{warnings:?}");
        AUDIT.remove_app(shop.id()).map(drop)
    });
}

#[test]
fn the_context_of_a_test_logs_nothing() {
    if setup(&DB, KIND, |config| config).is_none() {
        return;
    }
    let tests = |isolation| {
        let setup: TestSetup<Conn> = setup(&DB, KIND, |config| config).expect("it is not switched off");
        setup.isolation(isolation)
    };
    for isolation in [TestIsolation::Database, TestIsolation::Rollback] {
        let before = logged::count();
        logged::listen();
        let id = run(tests(isolation), |app: App<Conn>| {
            assert_is!(add(&DB.session().expect("a session"), "Ada"), Ok(1));
            // What the code under test forgets is still a warning.
            let id = app.id().to_owned();
            DB.session().expect("a session").rollback().expect("nothing refuses it");
            assert_silent(&app, "a request that commits", || drop(app.run(|| add(&DB.session()?, "Bob"))));
            assert_silent(&app, "a request that reads", || drop(app.context(|| names(&DB.session()?))));
            assert_warns(&app, "a request that forgets", || drop(app.context(|| add(&DB.session()?, "Cid"))));
            assert_is!(add(&DB.session().expect("a session"), "Cid"), Ok(1));
            Ok::<_, Error>(id)
        })
        .expect("nothing fails");
        let about = format!("app `{id}` ");
        let lines = logged::lines_since(before);
        assert_eq!(lines.iter().filter(|line| line.contains(FORGOTTEN) && line.contains(&about)).count(), 1);
        let test = tests(isolation).start().expect("a test");
        assert_silent(&test, "the guard of a test", || {
            assert_is!(test.context(|| add(&DB.session()?, "Ada")), Ok(1));
            test.enter(|| assert_is!(DB.session().and_then(|session| add(&session, "Ada")), Ok(1)));
        });
        test.finish().expect("nothing is left");
    }
}

/// Complaints about other libraries: a failed request that was committed all the same, a caught error that turned a
/// later commit into a success, a commit that was joined by an outer transaction, a read-only transaction that dropped
/// changes silently, and a failed commit at the end of a request that only the log had seen.
#[test]
fn complaints_about_other_libraries_do_not_hold_here() {
    test_on(Fixture::sql("blog", blog::tables(KIND)), |shop| {
        // A response of the program's own kind, for an error that was handled.
        let response = shop.scope().run_and_commit_if(
            |status: &u16| *status < 400,
            || {
                add(&DB.session()?, "by a failed request")?;
                let found = DB.session()?.first::<i32>(users::table.filter(users::name.eq("Eve")).select(users::id));
                Ok::<_, Trouble>(found.map_or(404, |_| 200))
            },
        );
        assert_is!(response, Ok(404));
        // Every error rolls back, whatever its type.
        for error in [Trouble::OutOfStock("tea"), Trouble::Session(DB.app("unknown").unwrap_err())] {
            let left: Result<(), Trouble> = shop.scope().run_and_commit(|| {
                add(&DB.session()?, "by an error")?;
                Err(error)
            });
            assert!(left.is_err());
        }
        // An error that the program has swallowed: only PostgreSQL has aborted the transaction, and it says so.
        let swallowed = shop.run(|| {
            add(&DB.session()?, "Ada")?;
            assert!(add(&DB.session()?, "Ada").is_err());
            Ok(())
        });
        match KIND {
            Kind::Postgres => assert_is!(swallowed, Err(error) if error.is_rollback_required()),
            Kind::Sqlite | Kind::Mariadb => assert_is!(swallowed, Ok(())),
        }
        assert_warns(shop, "a swallowed error", || {
            let swallowed = shop.context(|| {
                add(&DB.session()?, "Bob")?;
                assert!(add(&DB.session()?, "Bob").is_err());
                Ok(())
            });
            assert_is!(swallowed, Ok(()));
        });
        // A read-only scope cannot write, and does not lose changes silently.
        let change = || {
            DB.session()?.add(blog::NewWriter { name: "Ada".into(), email: None })?;
            Ok::<_, Error>(())
        };
        assert_warns(shop, "a read-only scope", || assert_is!(shop.scope().read_only().run(change), Ok(())));
        assert!(shop.scope().read_only().run_and_commit(change).is_err());
        // A forgotten commit that an early return has skipped.
        assert_warns(shop, "an early return", || {
            let returned = shop.context(|| {
                add(&DB.session()?, "Cid")?;
                if DB.session()?.exists(users::table)? {
                    return Ok(());
                }
                DB.session()?.commit()
            });
            assert_is!(returned, Ok(()));
        });
        // What has ended the transaction may have committed it, so a warning of lost changes could be wrong.
        assert_silent(shop, "a raw end", || {
            let ended = shop.context(|| {
                add(&DB.session()?, "Dan")?;
                raw(&DB.session()?, "COMMIT")
            });
            assert!(ended.is_ok() || ended.is_err_and(|error| error.is_rollback_required()));
        });
        let kept: &[&str] = if KIND == Kind::Postgres { &["Dan"] } else { &["Ada", "Dan"] };
        assert_eq!(shop.names(), kept);
        Ok(())
    });
}
