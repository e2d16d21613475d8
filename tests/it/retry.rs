//! `retry`: a whole transaction, run again when the database asks for that.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diesel_session::session::Retry;

use super::*;

for_each_database!(postgres, mariadb, any_postgres, any_mariadb =>
    retry_repeats_a_deadlock_victim_and_both_commit,
    retry_ignores_a_failure_that_a_savepoint_undid,
);
for_each_database!(sqlite, any_sqlite =>
    retry_does_not_repeat_a_commit_whose_hook_has_run,
    retry_repeats_a_busy_begin_on_sqlite,
);

/// Options under which a conflict is found soon. MariaDB counts lock timeouts in seconds, and detects changes only with
/// this setting.
fn touchy(config: Config) -> Config {
    let config = config.lock_timeout(Duration::from_millis(50)).wal(false);
    if KIND == Kind::Mariadb {
        config.connection_init_sql("SET SESSION innodb_snapshot_isolation = ON")
    } else {
        config
    }
}

fn rename(session: &Session<Conn>, id: i32, name: &str) -> Result<usize> {
    session.execute(diesel::update(users::table.find(id)).set(users::name.eq(name)))
}

/// What another session does and commits.
fn meanwhile(shop: &Shop<Conn>, body: impl FnOnce(&Session<Conn>) -> Result<usize>) -> Result<()> {
    shop.run(|| body(&DB.session()?)).map(drop)
}

/// Another session that conflicts with readers of users: it renames user number 1 and commits. On SQLite it reads while
/// they commit.
struct Rival<'s> {
    shop: &'s Shop<Conn>,
    reader: OtherConnection,
    changes: i32,
}

impl<'s> Rival<'s> {
    fn new(shop: &'s Shop<Conn>) -> Result<Self> {
        let mut reader = shop.other_connection();
        if KIND == Kind::Sqlite {
            // Only without a write-ahead log do readers matter.
            assert!(reader.write("PRAGMA journal_mode = DELETE"));
        }
        meanwhile(shop, |session| add_as(session, 1, "Ada"))?;
        Ok(Self { shop, reader, changes: 0 })
    }

    /// To be called in the transaction that is to fail, before it renames.
    fn interfere(&mut self, session: &Session<Conn>) -> Result<()> {
        names(session)?;
        if KIND == Kind::Sqlite {
            assert!(self.reader.write("BEGIN; SELECT * FROM users"));
            return Ok(());
        }
        self.changes += 1;
        let change = diesel::update(users::table.find(1)).set(users::age.eq(self.changes));
        meanwhile(self.shop, |session| session.execute(change))
    }

    fn leave(&mut self) {
        if KIND == Kind::Sqlite {
            assert!(self.reader.write("COMMIT"));
        }
    }
}

/// Runs `body` where the rival's changes conflict.
fn conflicting<T, E: From<Error>>(
    shop: &Shop<Conn>,
    body: impl FnOnce(&Session<Conn>) -> Result<T, E>,
) -> Result<T, E> {
    shop.scope().isolation(Isolation::RepeatableRead).run(|| body(&DB.session()?))
}

#[test]
fn retry_runs_a_success_once_and_commits_it() {
    test(|shop| {
        for scope in [shop.scope(), shop.scope().autocommit()] {
            scope.run(|| {
                let session = DB.session()?;
                let mut runs = 0;
                let answer = session.retry(3, |session| {
                    runs += 1;
                    assert!(session.in_transaction());
                    add(session, "Ada")?;
                    Ok::<_, Error>(42)
                })?;
                assert_eq!((answer, runs, session.in_transaction()), (42, 1, false));
                // No attempt is one attempt.
                session.retry(0, |session| add(session, "Bob"))?;
                session.retry(Retry::attempts(0), |session| add(session, "Cid"))?;
                assert_eq!(shop.names(), ["Ada", "Bob", "Cid"]);
                shop.assert_at_rest();
                session.execute(diesel::delete(users::table))?;
                session.commit()
            })?;
        }
        Ok(())
    });
}

#[test]
fn retry_returns_a_permanent_failure_at_once() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let mut runs = 0;
            session.retry(3, |session| add_as(session, 1, "Ada"))?;
            let refused = session.retry(3, |session| {
                runs += 1;
                add(session, "Bob")?;
                add_as(session, 1, "Eve")
            });
            assert_eq!(kind_of(&refused.expect_err("there is a number 1")), Some(&DatabaseErrorKind::UniqueViolation));
            let refused: Result<(), Trouble> = session.retry(3, |session| {
                runs += 1;
                add(session, "Cid")?;
                Err(Trouble::OutOfStock("tea"))
            });
            assert_is!(refused, Err(Trouble::OutOfStock("tea")));
            let message = panic_of(|| {
                session.retry(3, |session| -> Result<()> {
                    runs += 1;
                    add(session, "Dan")?;
                    panic!("on purpose")
                })
            });
            assert_eq!((message.as_str(), runs), ("on purpose", 3), "each ran once");
            assert!(!session.in_transaction());
            assert_eq!(shop.names(), ["Ada"]);
            Ok(())
        })
    });
}

// Not on SQLite: one writer at a time: there is nothing to deadlock on.
fn retry_repeats_a_deadlock_victim_and_both_commit() {
    test(|shop| {
        meanwhile(shop, |session| add_as(session, 1, "Ada"))?;
        meanwhile(shop, |session| add_as(session, 2, "Bob"))?;
        let both_have_one = Barrier::new(2);
        let runs = AtomicUsize::new(0);
        let cross = |mine: i32, yours: i32| {
            shop.context(|| {
                let mut first = true;
                DB.session()?.retry(3, |session| {
                    runs.fetch_add(1, Ordering::SeqCst);
                    rename(session, mine, &format!("{mine} by {mine}"))?;
                    if std::mem::take(&mut first) {
                        both_have_one.wait();
                    }
                    rename(session, yours, &format!("{yours} by {mine}"))
                })
            })
        };
        std::thread::scope(|threads| {
            let other = threads.spawn(|| cross(1, 2));
            cross(2, 1)?;
            other.join().expect("it ends")
        })?;
        assert_eq!(runs.into_inner(), 3, "one of the two was the victim, once");
        let names = shop.names();
        assert!(names == ["1 by 1", "2 by 1"] || names == ["1 by 2", "2 by 2"], "{names:?}");
        Ok(())
    });
}

/// A serialization failure on PostgreSQL, a record that has changed on MariaDB, a commit that is `SQLITE_BUSY`.
#[test]
fn retry_of_a_conflict_begins_without_earlier_changes() {
    test_with(touchy, |shop| {
        let mut rival = Rival::new(shop)?;
        let mut runs = 0;
        let done: Result<usize, Trouble> = conflicting(shop, |session| {
            session.retry(3, |session| {
                runs += 1;
                assert_eq!(names(session)?, ["Ada"], "attempt {runs}");
                add_as(session, 2, &format!("attempt {runs}"))?;
                match runs {
                    1 => rival.interfere(session)?,
                    2 if KIND == Kind::Sqlite => {}
                    2 => rival.interfere(session)?,
                    _ => rival.leave(),
                }
                // What the program makes of the failure does not say what it was.
                rename(session, 1, "Ada").map_err(|_| Trouble::OutOfStock("tea"))
            })
        });
        assert_is!(done, Ok(1));
        assert_eq!(runs, 3);
        assert_eq!(shop.names(), ["Ada", "attempt 3"]);
        Ok(())
    });
}

#[test]
fn retry_returns_the_error_of_the_last_attempt() {
    test_with(touchy, |shop| {
        let mut rival = Rival::new(shop)?;
        let mut runs = 0;
        let error = conflicting(shop, |session| {
            session.retry(2, |session| {
                runs += 1;
                add_as(session, 2, "Bob")?;
                if KIND != Kind::Sqlite || runs == 1 {
                    rival.interfere(session)?;
                }
                rename(session, 1, "Eve")
            })
        });
        let error = error.expect_err("it never succeeds");
        assert!(
            (error.kind() == ErrorKind::Query || error.kind() == ErrorKind::LockTimeout)
                && error.location().expect("a location").file().ends_with("retry.rs"),
            "{error:?}"
        );
        assert_eq!(error.kind() == ErrorKind::LockTimeout, KIND == Kind::Sqlite, "{error}");
        assert!(error.is_transient(), "{error}");
        assert_eq!(runs, 2);
        rival.leave();
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

/// A thousand attempts would take minutes.
#[test]
fn retry_ends_at_the_deadline_of_the_scope() {
    test_with(touchy, |shop| {
        let mut rival = Rival::new(shop)?;
        let mut runs = 0;
        let scope = shop.scope().isolation(Isolation::RepeatableRead).deadline(Duration::from_millis(400));
        let error = scope.run(|| {
            DB.session()?.retry(1000, |session| {
                runs += 1;
                if KIND != Kind::Sqlite || runs == 1 {
                    rival.interfere(session)?;
                }
                rename(session, 1, "Eve")
            })
        });
        let error = error.expect_err("it never succeeds");
        assert!(error.is_transient() || error.kind() == ErrorKind::DeadlineExceeded, "{error}");
        assert!(runs < 1000, "the deadline ends the attempts: {runs}");
        rival.leave();
        Ok(())
    });
}

/// Functions that have a transaction of their own are savepoints here.
#[test]
fn retry_repeats_a_conflict_in_a_savepoint() {
    test_with(touchy, |shop| {
        let mut rival = Rival::new(shop)?;
        let mut runs = 0;
        conflicting(shop, |session| {
            session.retry(2, |session| {
                runs += 1;
                if runs == 1 {
                    rival.interfere(session)?
                } else {
                    rival.leave()
                }
                session.transaction(|session| session.savepoint(|session| rename(session, 1, "Eve")))
            })
        })?;
        assert_eq!((runs, shop.names()), (2, vec!["Eve".to_owned()]));
        Ok(())
    });
}

/// Where the failure leaves the transaction alive.
fn retry_ignores_a_failure_that_a_savepoint_undid() {
    test_with(
        |config| config.lock_timeout(Duration::from_millis(50)),
        |shop| {
            meanwhile(shop, |session| add_as(session, 1, "Ada"))?;
            let mut holder = shop.other_connection();
            let mut runs = 0;
            let mut attempt = |goes_on: bool| {
                let started = runs;
                conflicting(shop, |session| {
                    session.retry(2, |session| {
                        runs += 1;
                        if KIND == Kind::Mariadb {
                            assert!(holder.write("BEGIN; UPDATE users SET age = 1 WHERE id = 1"));
                        } else if runs == started + 1 {
                            names(session)?;
                            meanwhile(shop, |session| rename(session, 1, "Ada"))?;
                        }
                        let refused = session.savepoint(|session| rename(session, 1, "Eve")).is_err();
                        if KIND == Kind::Mariadb {
                            assert!(holder.write("ROLLBACK"));
                        }
                        if goes_on {
                            add(session, "Bob")?;
                        }
                        if refused { Err(Trouble::OutOfStock("tea")) } else { Ok(()) }
                    })
                })
                .is_err()
                .then_some(runs - started)
            };
            assert_eq!(attempt(true), Some(1), "dealt with");
            let passed_on = if KIND == Kind::Mariadb { Some(2) } else { None };
            assert_eq!(attempt(false), passed_on, "passed on");
            Ok(())
        },
    );
}

#[test]
fn retry_repeats_a_conflict_seen_only_inside_with() {
    test_with(touchy, |shop| {
        let mut rival = Rival::new(shop)?;
        // Handed on as Diesel's error, swallowed, hidden in an error of another type, and handed on by code that owns
        // the connection for a while.
        for way in 0..4 {
            let mut runs = 0;
            let done: Result<(), Trouble> = conflicting(shop, |session| {
                session.retry(2, |session| {
                    runs += 1;
                    if runs == 1 {
                        rival.interfere(session)?
                    } else {
                        rival.leave()
                    }
                    let statement = diesel::update(users::table.find(1)).set(users::name.eq(format!("way {way}")));
                    match way {
                        0 => session
                            .with(|conn| statement.execute(conn))
                            .map(drop)
                            .map_err(|_| Trouble::OutOfStock("tea"))?,
                        1 => session.with(|conn| Ok(statement.execute(conn).is_ok())).map(drop)?,
                        2 => session
                            .with_connection(|conn| statement.execute(conn).map_err(|_| Trouble::OutOfStock("tea")))
                            .map(drop)?,
                        _ => {
                            let mut conn = session.connection()?;
                            let done = statement.execute(&mut *conn);
                            done.map_err(|_| Trouble::OutOfStock("tea"))?;
                        }
                    }
                    Ok(())
                })
            });
            assert_is!(done, Ok(()));
            assert_eq!((runs, shop.names()), (2, vec![format!("way {way}")]));
        }
        Ok(())
    });
}

#[test]
fn retry_drops_hooks_of_failed_attempts_and_keeps_earlier_ones() {
    test_with(touchy, |shop| {
        let mut rival = Rival::new(shop)?;
        let told = Rc::new(RefCell::new(Vec::new()));
        let tell = |what: String| {
            let told = Rc::clone(&told);
            move || told.borrow_mut().push(what)
        };
        // Fails, commits, fails for good.
        for (last, rival_stays) in [(2, false), (2, true)] {
            let mut runs = 0;
            let done = conflicting(shop, |session| {
                session.after_commit(tell("committed".into()))?;
                session.after_rollback(tell("rolled back".into()))?;
                session.retry(last, |session| {
                    runs += 1;
                    session.before_commit(tell(format!("before {runs}")))?;
                    session.after_commit(tell(format!("committed {runs}")))?;
                    session.after_rollback(tell(format!("rolled back {runs}")))?;
                    match runs {
                        1 => rival.interfere(session)?,
                        _ if !rival_stays => rival.leave(),
                        _ if KIND != Kind::Sqlite => rival.interfere(session)?,
                        _ => {}
                    }
                    rename(session, 1, "Eve")
                })
            });
            assert_eq!(done.is_err(), rival_stays);
            let told = std::mem::take(&mut *told.borrow_mut());
            // SQLite finds the conflict at the commit, after what is to be done before it.
            let wanted: &[&str] = match (rival_stays, KIND) {
                (false, Kind::Sqlite) => &["before 1", "rolled back 1", "before 2", "committed", "committed 2"],
                (false, _) => &["rolled back 1", "before 2", "committed", "committed 2"],
                (true, Kind::Sqlite) => &["before 1", "rolled back 1", "before 2", "rolled back", "rolled back 2"],
                (true, _) => &["rolled back 1", "rolled back", "rolled back 2"],
            };
            assert_eq!(told, wanted);
        }
        rival.leave();
        Ok(())
    });
}

// Only on SQLite: the conflict is not one of the commit.
fn retry_does_not_repeat_a_commit_whose_hook_has_run() {
    test_with(touchy, |shop| {
        let mut rival = Rival::new(shop)?;
        let mut runs = 0;
        let refused = conflicting(shop, |session| {
            let again = session.clone();
            session.before_commit(move || add(&again, "by the hook").map(drop))?;
            session.retry(3, |session| {
                runs += 1;
                rival.interfere(session)?;
                rename(session, 1, "Eve")
            })
        });
        assert_is!(&refused, Err(error) if error.kind() == ErrorKind::Query || error.kind() == ErrorKind::LockTimeout);
        assert_eq!(runs, 1, "a second attempt would have been committed without the hook");
        rival.leave();
        Ok(())
    });
}

#[test]
fn retry_after_other_statements_is_not_repeatable() {
    test(|shop| {
        let run = |session: &Session<Conn>| session.retry(3, |_| -> Result<()> { panic!("it must not run") });
        let refused = |error: Result<()>, inside: Option<&str>, line: u32| match error {
            Err(error) if error.kind() == ErrorKind::NotRepeatable => {
                assert!(error.to_string().contains(inside.unwrap_or("this session began")), "{error}");
                assert!(error.location().expect("a location").file().ends_with("retry.rs"), "{error}");
                assert_place(error.earlier_location().expect("a location"), "retry.rs", line);
            }
            other => panic!("{other:?}"),
        };
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            refused(run(&session), None, line!() - 1);
            session.rollback()?;
            session.transaction(|session| {
                refused(run(session), Some("transaction"), line!() - 1);
                session.savepoint(|session| {
                    refused(run(session), Some("savepoint"), line!() - 1);
                    Ok::<_, Error>(())
                })
            })?;
            session.retry(1, |session| {
                refused(run(session), Some("retry"), line!() - 1);
                assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::InsideTransaction && error.to_string().contains("inside the `retry`"));
                add(session, "Bob")
            })?;
            Ok::<_, Error>(())
        })?;
        shop.scope().begin_eagerly().run(|| {
            let session = DB.session()?;
            names(&session)?;
            refused(run(&session), None, line!() - 1);
            Ok(())
        })
    });
}

/// SQLite: another program writes, or another thread of this one, when the transaction is to begin.
fn retry_repeats_a_busy_begin_on_sqlite() {
    const HELD: Duration = Duration::from_millis(300);
    test_with(touchy, |shop| {
        let mut program = shop.other_connection();
        assert!(program.write("BEGIN IMMEDIATE"));
        let mut runs = 0;
        let refused = shop.context(|| {
            DB.session()?.retry(2, |session| {
                runs += 1;
                add(session, "Ada")
            })
        });
        let error = refused.expect_err("the lock is held");
        assert!(
            error.kind() == ErrorKind::LockTimeout
                && error.blockers().expect("blockers")[0].name.starts_with("another process"),
            "{error:?}"
        );
        assert!(error.is_transient() && error.to_string().contains("database is locked"), "{error}");
        assert_eq!(runs, 0);

        std::thread::scope(|threads| {
            let started = Instant::now();
            threads.spawn(|| {
                // The other program writes for that time.
                std::thread::sleep(HELD);
                assert!(program.write("COMMIT"));
            });
            shop.context(|| DB.session()?.retry(1000, |session| add(session, "Ada")))?;
            assert!(started.elapsed() >= HELD, "six times as long as one attempt waits");
            Ok::<_, Error>(())
        })?;

        let has_it = Barrier::new(2);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                shop.context(|| {
                    DB.session()?.begin()?;
                    has_it.wait();
                    // The other thread writes for that time.
                    std::thread::sleep(HELD);
                    DB.session()?.rollback()
                })
                .expect("no other connection writes");
            });
            has_it.wait();
            let refused = shop.context(|| DB.session()?.retry(1, |session| add(session, "Bob")));
            assert_error!(&refused, LockTimeout);
            shop.context(|| DB.session()?.retry(1000, |session| add(session, "Bob"))).map(drop)
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}
