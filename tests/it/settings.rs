//! The settings of a scope, as the server sees them.

use std::time::Duration;

use super::*;

for_each_database!(postgres, mariadb, any_postgres, any_mariadb =>
    deadline_ends_a_running_statement,
    configured_statement_timeout_is_restored_after_a_deadline,
);

/// A statement that takes longer than any test waits.
fn sleep_long(session: &Session<Conn>) -> Result<()> {
    raw(session, if KIND == Kind::Postgres { "SELECT pg_sleep(60)" } else { "SELECT SLEEP(60)" })
}

/// The time limit of statements that the server has for this connection, in its own words.
fn limit_of(session: &Session<Conn>) -> Result<String> {
    let query = match KIND {
        Kind::Postgres => "SELECT current_setting('statement_timeout') AS value",
        _ => "SELECT CAST(@@max_statement_time AS CHAR) AS value",
    };
    Ok(session.get_result::<Value>(sql_query(query))?.value)
}

#[test]
fn isolation_level_is_the_one_of_the_scope() {
    use Isolation::{ReadCommitted, ReadUncommitted, RepeatableRead, Serializable};
    test_alone(|shop| {
        for level in [ReadCommitted, RepeatableRead, Serializable, ReadUncommitted] {
            let seen = shop.scope().isolation(level).run(|| {
                let session = DB.session()?;
                let before = session.count(users::table)?;
                // Another connection, which has to wait if reading takes locks.
                let mut other_connection = shop.other_connection();
                let written = other_connection.write(&format!("INSERT INTO users (name) VALUES ('{level:?}')"));
                let seen = written.then_some(session.count(users::table)? - before);
                Ok::<_, Error>(seen)
            })?;
            let wanted = match (KIND, level) {
                (_, ReadUncommitted | ReadCommitted) => Some(1),
                (Kind::Postgres, RepeatableRead | Serializable) | (Kind::Mariadb, RepeatableRead) => Some(0),
                (Kind::Mariadb | Kind::Sqlite, _) => None,
            };
            assert_eq!(seen, wanted, "{level:?}");
            if KIND == Kind::Postgres {
                let name = shop.scope().isolation(level).run(|| {
                    let session = DB.session()?;
                    let query = sql_query("SELECT current_setting('transaction_isolation') AS value");
                    session.get_result::<Value>(query)
                })?;
                let wanted = ["read uncommitted", "read committed", "repeatable read", "serializable"];
                assert_eq!(name.value, wanted[level as usize]);
            }
        }
        // The level was that of one transaction, not of the connection.
        shop.context(|| {
            let session = DB.session()?;
            let query = match KIND {
                Kind::Postgres => "SELECT current_setting('transaction_isolation') AS value",
                Kind::Mariadb => "SELECT @@tx_isolation AS value",
                Kind::Sqlite => "SELECT '' AS value",
            };
            let level = session.get_result::<Value>(sql_query(query))?.value;
            assert!(["read committed", "REPEATABLE-READ", ""].contains(&level.as_str()), "{level}");
            Ok(())
        })
    });
}

#[test]
fn read_uncommitted_shows_dirty_rows_on_mariadb_only() {
    test(|shop| {
        let mut other_connection = shop.other_connection();
        assert!(other_connection.write("BEGIN; INSERT INTO users (name) VALUES ('dirty')"));
        for level in [Isolation::ReadUncommitted, Isolation::ReadCommitted] {
            let seen = shop.scope().isolation(level).run(|| DB.session()?.count(users::table))?;
            let dirty = KIND == Kind::Mariadb && level == Isolation::ReadUncommitted;
            assert_eq!(seen, i64::from(dirty), "{level:?}");
        }
        Ok(())
    });
}

#[test]
fn read_only_scope_reads_and_refuses_writes() {
    test_alone(|shop| {
        shop.run(|| add(&DB.session()?, "Ada"))?;
        let read = shop.scope().read_only().run_and_commit(|| names(&DB.session()?))?;
        assert_eq!(read, ["Ada"]);
        let typed = shop.scope().read_only().run(|| add(&DB.session()?, "Bob"));
        assert_error!(&typed, Query);
        let by_raw = shop.scope().read_only().run(|| raw(&DB.session()?, "INSERT INTO users (name) VALUES ('Bob')"));
        assert_error!(&by_raw, Query);
        let read = shop.scope().read_only().run(|| {
            let deleted = diesel::delete(users::table).execute(&mut *DB.session()?.connection()?);
            Ok::<_, Error>(deleted.is_err())
        })?;
        assert!(read);
        let in_savepoint = shop.scope().read_only().run(|| {
            let session = DB.session()?;
            let refused = session.savepoint(|session| add(session, "Bob"));
            assert_error!(&refused, Query);
            names(&session)
        })?;
        assert_eq!(in_savepoint, ["Ada"]);
        // The connection is none the worse for it.
        assert_eq!(shop.status().open, 1);
        shop.run(|| add(&DB.session()?, "Cid"))?;
        assert_eq!(shop.names(), ["Ada", "Cid"]);
        Ok(())
    });
}

#[test]
fn read_only_scope_sees_one_snapshot_beside_a_writer() {
    test(|shop| {
        let writer = shop.open_session()?;
        add(&writer, "Ada")?;
        let (before, after) = shop.scope().read_only().isolation(Isolation::RepeatableRead).run(|| {
            let session = DB.session()?;
            let before = session.count(users::table)?;
            writer.commit()?;
            Ok::<_, Error>((before, session.count(users::table)?))
        })?;
        assert_eq!((before, after), (0, 0));
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

#[test]
fn autocommit_scope_commits_each_statement_and_holds_no_connection() {
    test_alone(|shop| {
        shop.scope().autocommit().run(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            assert_eq!((session.in_transaction(), shop.status().in_use), (false, 0));
            shop.assert_at_rest();
            assert_eq!(shop.names(), ["Ada"]);
            assert_error!(add(&session, "Ada"), Query);
            // An error is that of its statement only, on every database.
            raw(&session, "INSERT INTO users (name) VALUES ('Bob')")?;
            session.rollback()?;
            session.connection()?.batch_execute("INSERT INTO users (name) VALUES ('Cid')").expect("the guard works");
            assert_eq!(names(&session)?, ["Ada", "Bob", "Cid"]);
            assert_eq!(shop.status().in_use, 0);
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob", "Cid"]);
        Ok(())
    });
}

#[test]
fn savepoint_in_an_autocommit_scope_is_a_transaction() {
    test(|shop| {
        shop.scope().autocommit().run(|| {
            let session = DB.session()?;
            session.savepoint(|s| {
                add(s, "Ada")?;
                s.savepoint(|s| add(s, "Grace").map(drop))
            })?;
            assert!(!session.in_transaction());
            assert_eq!(shop.names(), ["Ada", "Grace"]);
            let refused = session.savepoint(|s| {
                add(s, "Eve")?;
                Err::<(), Error>(diesel::result::Error::RollbackTransaction.into())
            });
            assert_error!(&refused, Query);
            Ok::<_, Error>(())
        })?;
        assert_eq!(shop.names(), ["Ada", "Grace"]);
        Ok(())
    });
}

#[test]
fn autocommit_scope_allows_transactions() {
    test(|shop| {
        shop.scope().autocommit().run(|| {
            let session = DB.session()?;
            session.transaction(|session| {
                add(session, "Ada")?;
                assert!(session.in_transaction() && shop.names().is_empty());
                Ok::<(), Error>(())
            })?;
            assert_eq!(shop.names(), ["Ada"]);
            let refused = session.transaction(|session| {
                add(session, "Bob")?;
                Err::<(), _>(Trouble::OutOfStock("tea"))
            });
            assert_is!(refused, Err(Trouble::OutOfStock("tea")));
            session.begin()?;
            add(&session, "Cid")?;
            session.rollback()?;
            session
                .with(|conn| {
                    conn.transaction(|conn| {
                        diesel::insert_into(users::table).values(users::name.eq("Dan")).execute(conn)?;
                        Err::<(), _>(diesel::result::Error::RollbackTransaction)
                    })
                })
                .expect_err("rolled back");
            add(&session, "Eve")
        })?;
        assert_eq!(shop.names(), ["Ada", "Eve"]);
        Ok(())
    });
}

// Not on SQLite: it finishes the statement that it runs.
fn deadline_ends_a_running_statement() {
    test_alone(|shop| {
        for autocommit in [false, true] {
            let scope = shop.scope().deadline(Duration::from_millis(200));
            let scope = if autocommit { scope.autocommit() } else { scope };
            let late = scope.run(|| {
                let session = DB.session()?;
                add(&session, &format!("before, autocommit {autocommit}"))?;
                let slept = sleep_long(&session);
                assert_is!(&slept, Err(error) if error.kind() == ErrorKind::DeadlineExceeded && error.location().expect("a location").file().ends_with("settings.rs"));
                assert!(slept.is_err_and(|error| error.is_timeout()));
                session.commit()
            });
            match (KIND, autocommit) {
                (Kind::Postgres, false) => assert_error!(&late, RollbackRequired),
                // The statement was ended, and nothing else.
                _ => assert_is!(late, Ok(())),
            }
        }
        assert_eq!(shop.names().len(), if KIND == Kind::Postgres { 1 } else { 2 });
        // The next user of the connection has no limit.
        let limit = shop.context(|| limit_of(&DB.session()?))?;
        assert!(["0", "0.000000"].contains(&limit.as_str()), "{limit}");
        Ok(())
    });
}

// Not on SQLite: it has no such limit.
fn configured_statement_timeout_is_restored_after_a_deadline() {
    test_alone_with(
        |config| config.statement_timeout(Duration::from_secs(77)),
        |shop| {
            let configured = shop.context(|| limit_of(&DB.session()?))?;
            assert!(configured.starts_with("77"), "{configured}");
            for autocommit in [false, true] {
                let scope = shop.scope().deadline(Duration::from_secs(30));
                let scope = if autocommit { scope.autocommit() } else { scope };
                let limited = scope.run(|| limit_of(&DB.session()?))?;
                assert_ne!(limited, configured);
                assert_eq!(shop.context(|| limit_of(&DB.session()?))?, configured);
            }
            assert_eq!(shop.status().open, 1);
            Ok(())
        },
    );
}

#[test]
fn deadline_sends_nothing_once_it_has_passed() {
    test(|shop| {
        // Long enough for the first statement on a busy machine.
        let limit = Duration::from_secs(2);
        let late = shop.scope().deadline(limit).run(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            // The time itself is what is tested.
            std::thread::sleep(limit);
            let error = add(&session, "Bob").expect_err("too late");
            assert!(error.is_timeout());
            assert!(error.kind() == ErrorKind::DeadlineExceeded && line_of(&error) == line!() - 2, "{error}");
            assert!(error.to_string().contains(&format!("{limit:?}")), "{error}");
            assert_error!(session.with(|conn| conn.batch_execute("SELECT 1")), DeadlineExceeded);
            assert_error!(session.connection(), DeadlineExceeded);
            assert_error!(session.savepoint(|session| add(session, "Bob")), DeadlineExceeded);
            session.rollback()?;
            assert_error!(session.begin(), DeadlineExceeded);
            add(&session, "Cid")
        });
        assert_error!(&late, DeadlineExceeded);
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn commit_after_the_deadline_keeps_what_was_sent_in_time() {
    test(|shop| {
        let limit = Duration::from_millis(150);
        let scope = || shop.scope().deadline(limit);
        // The time itself is what is tested.
        let late = || std::thread::sleep(limit);
        scope().run_and_commit(|| {
            add(&DB.session()?, "Ada")?;
            late();
            Ok::<_, Error>(())
        })?;
        scope().run(|| {
            let session = DB.session()?;
            add(&session, "Bob")?;
            late();
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}

#[test]
fn deadline_ends_the_wait_for_a_connection() {
    test_alone_with(
        |config| config.acquire_timeout(Duration::from_secs(60)),
        |shop| {
            let (held, release) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
            std::thread::scope(|threads| {
                threads.spawn(|| {
                    let session = shop.open_session().expect("a session");
                    session.begin().expect("it begins");
                    held.wait();
                    release.wait();
                });
                held.wait();
                let waited =
                    shop.scope().deadline(Duration::from_millis(100)).run(|| DB.session()?.count(users::table));
                release.wait();
                assert_error!(waited, AcquireTimeout);
                let error = waited.expect_err("the connection is held");
                assert!(error.to_string().contains("The scope's deadline ended the wait"), "{error}");
            });
            Ok(())
        },
    );
}
