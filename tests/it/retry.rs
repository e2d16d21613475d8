//! `retry`: a whole transaction, run again when the database asks for that.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diesel_session::Retry;

use super::*;

/// Options under which a conflict is found soon. MariaDB counts lock timeouts in seconds, and looks for changes if it is told to.
fn touchy(config: Config) -> Config {
    let config = config.lock_timeout(Duration::from_millis(50)).wal(false);
    if KIND == Kind::Mariadb { config.on_connect("SET SESSION innodb_snapshot_isolation = ON") } else { config }
}

fn rename(session: &Session<Conn>, id: i32, name: &str) -> Result<usize> {
    session.execute(diesel::update(users::table.find(id)).set(users::name.eq(name)))
}

/// What somebody else does and commits.
fn meanwhile(shop: &Shop<Conn>, body: impl FnOnce(&Session<Conn>) -> Result<usize>) -> Result<()> {
    shop.scope().commit_on_ok().run(|| body(&DB.session()?)).map(drop)
}

/// Somebody who is in the way of whoever reads users, renames number 1 and commits: by having changed it, and on SQLite by
/// reading when it is committed.
struct Rival<'s> {
    shop: &'s Shop<Conn>,
    reader: Stranger,
    changes: i32,
}

impl<'s> Rival<'s> {
    fn new(shop: &'s Shop<Conn>) -> Result<Self> {
        let mut reader = shop.stranger();
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
fn what_succeeds_runs_once_and_is_committed() {
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
fn a_failure_of_another_kind_is_returned_at_once() {
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

#[test]
fn the_victim_of_a_deadlock_runs_again_and_both_commit() {
    if KIND == Kind::Sqlite {
        // One writer at a time: there is nothing to deadlock on.
        return;
    }
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
fn a_conflict_is_run_again_and_finds_nothing_of_what_was_done_before() {
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
fn the_last_attempt_returns_its_error() {
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
        assert_is!(&error, Error::Query { at, .. } | Error::LockTimeout { at, .. } if at.file().ends_with("retry.rs"));
        assert_eq!(matches!(error, Error::LockTimeout { .. }), KIND == Kind::Sqlite, "{error}");
        assert!(error.is_transient(), "{error}");
        assert_eq!(runs, 2);
        rival.leave();
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

/// A thousand attempts would take minutes.
#[test]
fn the_deadline_of_the_scope_ends_the_attempts() {
    test_with(touchy, |shop| {
        let mut rival = Rival::new(shop)?;
        let (mut runs, started) = (0, Instant::now());
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
        assert!(error.is_transient() || matches!(error, Error::DeadlineExceeded { .. }), "{error}");
        assert!(runs < 1000 && started.elapsed() < Duration::from_secs(20), "{runs} attempts");
        rival.leave();
        Ok(())
    });
}

/// Functions that have a transaction of their own are savepoints here.
#[test]
fn a_conflict_in_a_savepoint_is_run_again_too() {
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
#[test]
fn a_failure_that_a_savepoint_undid_is_none_once_something_else_was_sent() {
    if KIND == Kind::Sqlite {
        return;
    }
    test_with(
        |config| config.lock_timeout(Duration::from_millis(50)),
        |shop| {
            meanwhile(shop, |session| add_as(session, 1, "Ada"))?;
            let mut holder = shop.stranger();
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
fn a_conflict_that_only_lent_code_has_seen_is_run_again() {
    test_with(touchy, |shop| {
        let mut rival = Rival::new(shop)?;
        // Handed on as Diesel's error, swallowed, and handed on by code that owns the connection for a while.
        for way in 0..3 {
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
fn hooks_go_with_their_attempt_and_those_from_before_with_the_last() {
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

#[test]
fn a_hook_that_can_run_only_once_makes_its_commit_the_last() {
    if KIND != Kind::Sqlite {
        // The conflict is not one of the commit.
        return;
    }
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
        assert_is!(refused, Err(Error::Query { .. } | Error::LockTimeout { .. }));
        assert_eq!(runs, 1, "a second attempt would have been committed without the hook");
        rival.leave();
        Ok(())
    });
}

#[test]
fn what_came_before_could_not_be_repeated() {
    test(|shop| {
        let run = |session: &Session<Conn>| session.retry(3, |_| -> Result<()> { panic!("it must not run") });
        let refused = |error: Result<()>, inside: Option<&str>, line: u32| match error {
            Err(error @ Error::NotRepeatable { since, .. }) => {
                assert!(error.to_string().contains(inside.unwrap_or("this session began")), "{error}");
                assert_is!(error, Error::NotRepeatable { inside: found, at, .. } if found == inside && at.file().ends_with("retry.rs"));
                assert_place(since, "retry.rs", line);
            }
            other => panic!("{other:?}"),
        };
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            refused(run(&session), None, line!() - 1);
            session.rollback()?;
            names(&session)?;
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
                assert_is!(session.commit(), Err(Error::InsideTransaction { outer: "retry", .. }));
                add(session, "Bob")
            })?;
            Ok(())
        })
    });
}

/// SQLite: another program writes, or another thread of this one, when the transaction is to begin.
#[test]
fn a_busy_beginning_is_tried_again() {
    if KIND != Kind::Sqlite {
        return;
    }
    const HELD: Duration = Duration::from_millis(300);
    test_with(touchy, |shop| {
        let mut program = shop.stranger();
        assert!(program.write("BEGIN IMMEDIATE"));
        let mut runs = 0;
        let refused = shop.context(|| {
            DB.session()?.retry(2, |session| {
                runs += 1;
                add(session, "Ada")
            })
        });
        let error = refused.expect_err("the lock is held");
        assert_is!(&error, Error::LockTimeout { blockers, .. } if blockers[0].name.starts_with("another process"));
        assert!(error.is_transient() && error.to_string().contains("database is locked"), "{error}");
        assert_eq!(runs, 0);

        std::thread::scope(|threads| {
            let started = Instant::now();
            threads.spawn(|| {
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
                    std::thread::sleep(HELD);
                    DB.session()?.rollback()
                })
                .expect("nobody else writes");
            });
            has_it.wait();
            let refused = shop.context(|| DB.session()?.retry(1, |session| add(session, "Bob")));
            assert_is!(refused, Err(Error::LockTimeout { .. }));
            shop.context(|| DB.session()?.retry(1000, |session| add(session, "Bob"))).map(drop)
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}
