//! An error's advice fits the place at which the program gets the error, and works.

use std::cell::RefCell;
use std::rc::Rc;

use diesel_session::Tracked;

use diesel_session::unit_of_work::RowState;

use super::*;

const AGAIN: &str = "then `get` it again and decide anew.";

/// A writer whom another program has changed since.
fn outdated(shop: &Shop<Conn>, session: &Session<Conn>) -> Result<Tracked<Writer>> {
    let ada = session.add(writer("Ada"))?;
    session.commit()?;
    elsewhere(shop, "UPDATE writers SET name = 'Eve', version = version + 1");
    Ok(ada)
}

/// The error of a write to such a row.
#[track_caller]
fn stale(session: &Session<Conn>, ada: &Tracked<Writer>) -> Error {
    ada.write().email = Some("ada@example.org".into());
    let error = session.flush().expect_err("another program has changed the row");
    assert!(error.is_stale(), "{error}");
    error
}

/// What the advice says in the end: the row is read again and written.
#[track_caller]
fn decides_anew(shop: &Shop<Conn>, session: &Session<Conn>, id: i32) -> Result<()> {
    let row = session.find::<Writer>(id)?;
    assert_eq!(row.read().name, "Eve");
    row.write().name = "Eva".into();
    session.commit()?;
    assert_eq!(shop.ask("SELECT name AS value FROM writers"), ["Eva"]);
    Ok(())
}

#[track_caller]
fn says(error: &Error, part: &str) {
    let text = error.to_string();
    assert!(text.contains(part), "no `{part}` in: {text}");
    // `rollback()` is advised where it can be called, and once.
    let times = usize::from(part.contains("`rollback()`"));
    assert_eq!(text.matches("`rollback()`").count(), times, "{text}");
    assert!(!text.contains("  ") && text.ends_with('.'), "{text}");
}

fn at(line: u32) -> String {
    format!("{}:{line}:", file!())
}

#[test]
fn stale_row_in_a_session_advises_rollback() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = outdated(shop, session)?;
            let id = ada.read().id;
            let error = stale(session, &ada);
            says(&error, &format!("Call `rollback()`, {AGAIN}"));
            let again = session.load::<i32>(writers::table.select(writers::id)).expect_err("it is to be rolled back");
            assert!(again.is_rollback_required() && !again.to_string().contains("decide anew"), "{again}");
            says(&again, "elsewhere call `rollback()`");
            session.rollback()?;
            decides_anew(shop, session, id)
        })
    });
}

#[test]
fn stale_row_in_a_closure_advises_its_end() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = outdated(shop, session)?;
            let id = ada.read().id;
            let line = line!() + 1;
            let outcome = session.transaction(|session| {
                let error = stale(session, &ada);
                says(&error, &format!("Return `Err` from the closure of the `transaction` at {}", at(line)));
                says(&error, AGAIN);
                assert_error!(session.rollback(), InsideTransaction);
                Err::<(), _>(error)
            });
            assert!(outcome.is_err_and(|error| error.is_stale()));
            decides_anew(shop, session, id)
        })
    });
}

#[test]
fn stale_row_in_nested_closures_advises_the_end_of_the_outermost() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = outdated(shop, session)?;
            let id = ada.read().id;
            let line = line!() + 1;
            let outcome = session.transaction(|session| {
                session.savepoint(|session| {
                    let error = stale(session, &ada);
                    says(&error, &format!("closure of the `transaction` at {}", at(line)));
                    Err::<(), _>(error)
                })
            });
            assert!(outcome.is_err());
            decides_anew(shop, session, id)
        })
    });
}

#[test]
fn stale_row_in_a_savepoint_advises_the_end_of_the_transaction_around_it() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = outdated(shop, session)?;
            let id = ada.read().id;
            session.begin()?;
            let line = line!() + 1;
            let outcome = session.savepoint(|session| {
                let error = stale(session, &ada);
                assert!(error.to_string().contains(&format!("closure of the `savepoint` at {}", at(line))), "{error}");
                says(&error, &format!("and call `rollback()`, {AGAIN}"));
                Err::<(), _>(error)
            });
            assert!(outcome.is_err());
            session.rollback()?;
            decides_anew(shop, session, id)
        })
    });
}

#[test]
fn stale_row_at_the_end_of_a_savepoint_advises_rollback() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = outdated(shop, session)?;
            let id = ada.read().id;
            session.begin()?;
            let outcome = session.savepoint(|_| {
                ada.write().email = None;
                ada.write().name = "Bob".into();
                Ok::<_, Error>(())
            });
            says(&outcome.expect_err("its flush fails"), &format!("Call `rollback()`, {AGAIN}"));
            session.rollback()?;
            decides_anew(shop, session, id)
        })
    });
}

#[test]
fn stale_row_at_the_commit_of_a_closure_needs_no_rollback() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = outdated(shop, session)?;
            let id = ada.read().id;
            let outcome = session.transaction(|_| {
                ada.write().name = "Bob".into();
                Ok::<_, Error>(())
            });
            let error = outcome.expect_err("its flush fails");
            assert_eq!(error.kind(), ErrorKind::Stale);
            says(&error, "The transaction was rolled back. `get` it again and decide anew.");
            decides_anew(shop, session, id)
        })
    });
}

#[test]
fn stale_row_in_an_autocommit_scope_needs_no_rollback() {
    blog(|shop| {
        let id = shop.context(|| {
            let ada = outdated(shop, &DB.session()?)?;
            Ok::<_, Error>(ada.read().id)
        })?;
        shop.scope().autocommit().run(|| {
            let session = DB.session()?;
            let ada = session.find::<Writer>(id)?;
            elsewhere(shop, "UPDATE writers SET version = version + 1");
            ada.write().name = "Bob".into();
            let error = session.flush().expect_err("another program has changed the row");
            says(&error, "The transaction was rolled back. `get` it again and decide anew.");
            decides_anew(shop, &session, id)
        })
    });
}

#[test]
fn stale_row_in_a_scope_that_commits_advises_its_end() {
    blog(|shop| {
        let mut id = 0;
        let outcome = shop.run(|| {
            let session = DB.session()?;
            let ada = outdated(shop, &session)?;
            id = ada.read().id;
            let error = stale(&session, &ada);
            says(&error, &format!("Return `Err` from the closure of the scope, or call `rollback()`, {AGAIN}"));
            Err::<(), _>(error)
        });
        assert!(outcome.is_err());
        let outcome = shop.run(|| {
            let session = DB.session()?;
            let eve = session.find::<Writer>(id)?;
            session.rollback()?;
            elsewhere(shop, "UPDATE writers SET version = version + 1");
            eve.write().email = Some("eve@example.org".into());
            Ok::<_, Error>(())
        });
        says(&outcome.expect_err("its commit flushes"), "The transaction was rolled back. `get` it again");
        inside(shop, |session| decides_anew(shop, session, id))
    });
}

#[test]
fn stale_row_in_a_hook_advises_the_hooks_error() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = outdated(shop, session)?;
            let id = ada.read().id;
            let seen = Rc::new(RefCell::new(String::new()));
            let (told, row) = (Rc::clone(&seen), ada.clone());
            session.begin()?;
            session.before_commit(move || -> Result<()> {
                row.write().name = "Bob".into();
                let error = DB.session()?.flush().expect_err("another program has changed the row");
                *told.borrow_mut() = error.to_string();
                Err(error)
            })?;
            let error = session.commit().expect_err("the hook refuses");
            let told = seen.borrow();
            assert!(told.contains("Return `Err` from the `before_commit` hook"), "{told}");
            assert!(!told.contains("`rollback()`"), "{told}");
            says(&error, &format!("Call `rollback()`, {AGAIN}"));
            session.rollback()?;
            decides_anew(shop, session, id)
        })
    });
}

#[test]
fn autoflush_says_once_what_undoes_the_transaction() {
    blog(|shop| {
        inside(shop, |session| {
            let twice = |session: &Session<Conn>| {
                session.add(writer("Ada"))?;
                session.add(writer("Ada"))?;
                Ok::<_, Error>(session.count(writers::table).expect_err("one name twice"))
            };
            let error = twice(session)?;
            assert_eq!(error.kind(), ErrorKind::Autoflush);
            says(&error, "Call `rollback()`.");
            assert!(
                error.to_string().starts_with("DS310 the query at ") && !error.to_string().contains("no_autoflush")
            );
            session.rollback()?;
            let outcome = session.retry(2, |session| {
                let error = twice(session)?;
                says(&error, "Return `Err` from the closure of the `retry` at ");
                Err::<(), _>(error)
            });
            assert!(outcome.is_err());
            let kept = session.transaction(|session| {
                let inner = session.savepoint(|session| {
                    let error = twice(session)?;
                    says(&error, "Return `Err` from the closure of the `savepoint` at ");
                    Err::<(), _>(error)
                });
                assert!(inner.is_err());
                session.add(writer("Bob"))?;
                Ok::<_, Error>(())
            });
            kept?;
            assert_eq!(shop.ask("SELECT name AS value FROM writers"), ["Bob"]);
            let ada = session.add(writer("Zoe"))?;
            session.flush()?;
            let guard = ada.write();
            let error = session.count(writers::table).expect_err("it is being written");
            assert!(format!("{error:#}").contains("Let the guard end first"), "{error:#}");
            assert_eq!(error.kind(), ErrorKind::Autoflush);
            drop(guard);
            session.rollback()
        })
    });
}

#[test]
fn rows_whose_parent_was_taken_back_can_be_added_anew() {
    blog(|shop| {
        inside(shop, |session| {
            let (ada, article) = (session.add(writer("Ada"))?, |writer: &Tracked<Writer>| NewArticle {
                writer_id: writer.key(),
                editor_id: None,
                title: "one".into(),
                body: String::new(),
            });
            session.add(article(&ada))?;
            session.expunge(&ada)?;
            let error = session.commit().expect_err("its writer was taken back");
            assert!(error.to_string().contains("DS312 1 new row of Article refers to"), "{error}");
            says(&error, "Call `rollback()`, then add those rows anew");
            session.rollback()?;
            let ada = session.add(writer("Ada"))?;
            session.add(article(&ada))?;
            session.commit()?;
            assert_eq!(titles(session)?, ["one"]);
            Ok(())
        })
    });
}

#[test]
fn changed_key_is_given_up_by_expire() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            session.commit()?;
            let id = ada.read().id;
            ada.write().id = id + 1;
            let error = session.flush().expect_err("the key was written");
            says(&error, "`expire` the handle");
            assert!(!error.to_string().contains("refresh"), "a refresh flushes first: {error}");
            session.expire(&ada)?;
            ada.write().name = "Bob".into();
            session.commit()?;
            assert_eq!((ada.read().id, shop.ask("SELECT name AS value FROM writers")), (id, vec!["Bob".into()]));
            Ok(())
        })
    });
}

#[test]
fn handle_of_another_session_is_found_in_this_one_once_it_is_there() {
    blog(|shop| {
        inside(shop, |session| {
            let other = shop.open_session()?;
            let ada = other.add(writer("Ada"))?;
            let error = session.delete(&ada).expect_err("it is the other session's");
            says(&error, "commit it in its own session, and then `get` it in this one.");
            other.commit()?;
            let id = ada.read().id;
            says(&session.delete(&ada).expect_err("it still is"), "`get` the row of that key in this session.");
            let mine = session.find::<Writer>(id)?;
            session.delete(&mine)?;
            session.commit()?;
            assert_eq!(mine.state(), RowState::Deleted);
            let error = session.delete(&mine).expect_err("it is gone");
            says(&error, "it is deleted; `add` a new row");
            Ok(())
        })
    });
}

#[test]
fn misuse_in_a_closure_has_advice_for_that_closure() {
    blog(|shop| {
        inside(shop, |session| {
            session.begin()?;
            session.savepoint(|session| {
                says(&session.commit().unwrap_err(), "Return `Ok` from its closure to keep what it did, and commit");
                says(&session.rollback().unwrap_err(), "Return `Err` from its closure, which undoes what it did");
                says(&session.remove().unwrap_err(), "Let its closure return first.");
                says(&session.retry(2, |_| Ok::<_, Error>(())).unwrap_err(), "Call `retry` instead of that");
                session.add(writer("Ada"))?;
                Ok::<_, Error>(())
            })?;
            says(&session.begin().unwrap_err(), "Remove this `begin`");
            let error = session.retry(2, |_| Ok::<_, Error>(())).unwrap_err();
            says(&error, "Call `commit()` or `rollback()` before `retry`");
            session.commit()?;
            session.retry(2, |session| {
                says(&session.retry(2, |_| Ok::<_, Error>(())).unwrap_err(), "Remove the inner `retry`");
                says(&session.commit().unwrap_err(), "the outermost `transaction` or `retry` commits.");
                says(&session.rollback().unwrap_err(), "Return `Err` from its closure instead, which rolls back.");
                Ok::<_, Error>(())
            })?;
            let guard = session.connection()?;
            says(&session.count(writers::table).unwrap_err(), "drop the guard of `connection()` first.");
            drop(guard);
            assert_eq!(writers(session)?, ["Ada"]);
            Ok(())
        })
    });
}

#[test]
fn pool_of_a_test_is_made_larger_by_the_test() {
    test_alone_with(
        |config| config.acquire_timeout(std::time::Duration::from_millis(200)),
        |shop| {
            let app = App::clone(shop);
            let (held, holds) = std::sync::mpsc::channel();
            let (done, end) = std::sync::mpsc::channel::<()>();
            let holder = std::thread::spawn(move || {
                app.context(|| {
                    DB.session()?.begin()?;
                    held.send(()).expect("the test waits for it");
                    let _ = end.recv();
                    Ok::<_, Error>(())
                })
            });
            holds.recv().expect("it begins");
            let error = shop.context(|| DB.session()?.begin()).expect_err("its one connection is held");
            assert!(error.kind() == ErrorKind::AcquireTimeout, "{error:?}");
            let text = error.to_string();
            assert!(text.contains("its one connection is in use, and no other caller waits for one. Held: "), "{text}");
            assert!(
                text.ends_with("End the transactions listed, or raise the test's `max_size` (`TestSetup::max_size`).")
            );
            let short = shop.scope().deadline(std::time::Duration::from_millis(50));
            let error = short.run(|| DB.session()?.begin()).expect_err("the scope has less time");
            assert!(error.to_string().contains("The scope's deadline ended the wait"), "{error}");
            drop(done);
            holder.join().expect("it ends")
        },
    );
}
