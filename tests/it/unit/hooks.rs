//! Hooks of flushes, and what a transaction's hooks are told of its rows.

use std::cell::RefCell;
use std::rc::Rc;

use diesel_session::{ChangeKind, Changes};

use super::*;

thread_local! {
    static TOLD: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

static HOOKED: Database<Conn> = connected()
    .before_flush(|_, changes| note("before_flush", changes))
    .after_flush(|_, changes| note("after_flush", changes))
    .before_commit(|_, changes| note("before_commit", changes))
    .after_commit(|_, changes| note("after_commit", changes))
    .after_rollback(|_, changes| note("after_rollback", changes));

fn note(hook: &str, changes: &Changes) -> Result<()> {
    let told = format!("{hook}: {}", shown(changes));
    TOLD.with(|all| all.borrow_mut().push(told));
    Ok(())
}

fn told() -> Vec<String> {
    TOLD.with(RefCell::take)
}

/// Kinds and names; of rows that are new nobody has a name yet.
fn shown(changes: &Changes) -> String {
    let one = |(kind, writer): (ChangeKind, &diesel_session::Tracked<Writer>)| {
        let name = writer.try_read().map_or_else(|_| "new".to_owned(), |writer| writer.name.clone());
        format!("{kind:?} {name}")
    };
    changes.of::<Writer>().map(one).collect::<Vec<_>>().join(", ")
}

/// A context of an application of the database object with hooks, on the test's database.
#[track_caller]
fn hooked(body: impl FnOnce(&Session<Conn>) -> Result<()>) {
    blog(|shop| {
        let id = crate::fixtures::unique("hooked");
        let app = HOOKED.init_app(&id, Config::new(shop.url()))?;
        let outcome = app.context(|| body(&HOOKED.session()?));
        HOOKED.remove_app(&id)?;
        outcome
    });
}

#[test]
fn each_row_is_told_once_and_what_a_savepoint_undid_is_not() {
    hooked(|session| {
        told();
        let ada = session.add(writer("Ada"));
        session.flush()?;
        assert_eq!(told(), ["before_flush: Insert new", "after_flush: Insert Ada"]);
        ada.write().name = "A".into();
        session.flush()?;
        let undone = session.savepoint(|session| {
            session.add(writer("Bob"));
            ada.write().name = "AA".into();
            session.flush()?;
            assert_eq!(shown(&session.changes()), "Insert AA, Insert Bob");
            Err::<(), _>(Error::NotFound { row: None, at: std::panic::Location::caller() })
        });
        assert!(undone.is_err());
        session.refresh(&ada)?;
        session.savepoint(|session| {
            session.add(writer("Eve"));
            Ok::<_, Error>(())
        })?;
        let gone = session.add(writer("Gone"));
        session.flush()?;
        session.delete(&gone)?;
        session.flush()?;
        told();
        session.commit()?;
        assert_eq!(told(), ["before_commit: Insert A, Insert Eve", "after_commit: Insert A, Insert Eve"]);
        ada.write().email = Some("a@example.org".into());
        session.flush()?;
        session.delete(&ada)?;
        session.commit()?;
        assert_eq!(told().last().map(String::as_str), Some("after_commit: Delete A"));
        // Nothing changed, nobody is told.
        session.commit()?;
        assert_eq!(told(), Vec::<String>::new());
        session.add(writer("Zoe"));
        session.flush()?;
        told();
        session.rollback()?;
        assert_eq!(told(), ["after_rollback: Insert new"]);
        Ok(())
    });
}

#[test]
fn hooks_of_the_session_ask_for_the_changes() {
    blog(|shop| {
        inside(shop, |session| {
            let seen = Rc::new(RefCell::new(Vec::new()));
            let (in_hook, inner) = (Rc::clone(&seen), session.clone());
            session.after_commit(move || in_hook.borrow_mut().push(shown(&inner.changes())))?;
            let (in_hook, inner) = (Rc::clone(&seen), session.clone());
            session.before_commit(move || {
                inner.add(writer("Bob"));
                in_hook.borrow_mut().push("before".into());
            })?;
            session.add(writer("Ada"));
            session.commit()?;
            assert_eq!(*seen.borrow(), ["before", "Insert Ada, Insert Bob"]);
            let (in_hook, inner) = (Rc::clone(&seen), session.clone());
            session.after_rollback(move || in_hook.borrow_mut().push(inner.changes().len().to_string()))?;
            session.add(writer("Eve"));
            session.flush()?;
            session.rollback()?;
            assert_eq!(seen.borrow().last().map(String::as_str), Some("1"));
            session.remove()
        })
    });
}

#[test]
fn what_a_hook_changes_goes_with_the_flush_or_the_next() {
    blog(|shop| {
        inside(shop, |session| {
            session.before_flush(|session, changes| {
                for (_, writer) in changes.of::<Writer>().filter(|(kind, _)| *kind == ChangeKind::Update) {
                    writer.update(|writer| writer.email = Some("stamped".into()));
                }
                // A query inside flushes nothing, and a flush is refused.
                session.count(writers::table)?;
                assert_is!(session.flush(), Err(Error::AlreadyFlushing { .. }));
                assert_is!(session.commit(), Err(Error::AlreadyFlushing { .. }));
                Ok(())
            })?;
            session.after_flush(|session, changes| {
                if changes.of::<Article>().next().is_none() {
                    let of: Vec<_> = changes.of::<Writer>().map(|(_, writer)| writer.key()).collect();
                    of.into_iter().for_each(|key| drop(session.add(article(key, "journal"))));
                }
            })?;
            let ada = session.add(writer("Ada"));
            session.flush()?;
            assert!(session.is_dirty());
            assert_eq!(titles(session)?, ["journal"]);
            ada.write().name = "A".into();
            session.commit()?;
            assert_eq!((ada.read().email.as_deref(), titles(session)?.len()), (Some("stamped"), 2));
            session.remove()
        })
    });
}

#[test]
fn a_hook_that_adds_for_ever_is_an_error() {
    blog(|shop| {
        inside(shop, |session| {
            session.after_flush(|session, _| drop(session.add(node(None, "more"))))?;
            session.add(node(None, "first"));
            let error = session.commit().expect_err("it never ends");
            assert!(matches!(error, Error::HookFailed { hook: "after_flush", committed: false, .. }), "{error}");
            session.rollback()?;
            session.remove()?;
            assert_eq!(session.count(nodes::table)?, 0);
            Ok(())
        })
    });
}

#[test]
fn a_hook_that_fails_or_panics_prevents_the_flush() {
    blog(|shop| {
        inside(shop, |session| {
            session.before_flush(|_, changes| {
                if changes.of::<Writer>().next().is_some() {
                    Err(Error::NotFound { row: None, at: std::panic::Location::caller() })
                } else {
                    Ok(())
                }
            })?;
            let ada = session.add(writer("Ada"));
            assert_is!(session.flush(), Err(Error::NotFound { .. }));
            assert_is!(session.load::<String>(writers::table.select(writers::name)), Err(Error::Autoflush { .. }));
            // Nothing was sent, and nothing is lost.
            session.delete(&ada)?;
            session.add(node(None, "kept"));
            session.commit()?;
            session.remove()?;
            session.before_flush(|_, _| panic!("on purpose"))?;
            session.add(node(None, "x"));
            let error = session.commit().expect_err("it panicked");
            assert!(matches!(error, Error::HookFailed { hook: "before_flush", committed: false, .. }), "{error}");
            session.remove()?;
            session.after_flush(|_, _| panic!("on purpose"))?;
            session.add(node(None, "y"));
            assert_is!(session.flush(), Err(Error::HookFailed { hook: "after_flush", .. }));
            session.rollback()?;
            session.remove()?;
            let labels: Vec<String> = session.load(nodes::table.select(nodes::label))?;
            assert_eq!(labels, ["kept"]);
            Ok(())
        })
    });
}

/// What a hook does, and whether it takes away what is to be flushed.
type Prank = fn(&Session<Conn>);

const PRANKS: [Prank; 6] = [
    |session| session.rollback().expect("it is allowed"),
    |session| session.remove().expect("it is allowed"),
    |session| session.expunge_all(),
    |session| drop(session.transaction(|_| Err::<(), Error>(refusal()))),
    |session| {
        session.expunge_all();
        session.add(writer("another"));
    },
    |session| {
        session.rollback().expect("it is allowed");
        drop(session.execute(diesel::insert_into(nodes::table).values(nodes::label.eq("by the hook"))));
    },
];

fn refusal() -> Error {
    Error::NotFound { row: None, at: std::panic::Location::caller() }
}

/// The scopes in which a flush is part of a transaction, and in which it is one.
fn in_scopes(shop: &Shop<Conn>, body: impl Fn(&Session<Conn>) -> Result<()>) -> Result<()> {
    shop.scope().run(|| body(&DB.session()?))?;
    shop.scope().autocommit().run(|| body(&DB.session()?))
}

#[track_caller]
fn assert_taken_away(outcome: Result<()>, hook: &str) {
    match outcome {
        Err(error @ Error::HookFailed { hook: failed, committed: false, .. }) if failed == hook => {
            assert!(error.to_string().contains("return `Err` from the hook"), "{error}");
        }
        other => panic!("the `{hook}` hook took the rows away: {other:?}"),
    }
}

fn no_writer_is_stored(shop: &Shop<Conn>) -> bool {
    shop.ask("SELECT name AS value FROM writers").is_empty()
}

fn nothing_is_stored(shop: &Shop<Conn>) -> bool {
    shop.ask("SELECT name AS value FROM writers").is_empty() && shop.ask("SELECT label AS value FROM nodes").is_empty()
}

#[test]
fn flush_fails_if_a_hook_before_it_takes_the_rows_away() {
    blog(|shop| {
        for (number, prank) in PRANKS.into_iter().enumerate() {
            for begun in [false, true] {
                in_scopes(shop, |session| {
                    if begun {
                        session.add(node(None, "earlier"));
                        session.flush()?;
                    }
                    if begun && KIND != Kind::Sqlite && !session.in_transaction() {
                        // An autocommit scope has stored it.
                        session.execute(diesel::delete(nodes::table))?;
                    } else if !session.in_transaction() {
                        session.execute(diesel::delete(nodes::table))?;
                        session.commit()?;
                    }
                    session.before_flush(move |session, changes| {
                        if changes.of::<Writer>().next().is_some() {
                            prank(session);
                        }
                    })?;
                    session.add(writer("Ada"));
                    assert_taken_away(session.flush(), "before_flush");
                    // A commit stores nothing of what is left.
                    let _ = session.commit();
                    assert!(no_writer_is_stored(shop), "{number}");
                    session.rollback()?;
                    session.remove()?;
                    session.add(writer("Bob"));
                    session.commit()?;
                    assert_eq!(shop.ask("SELECT name AS value FROM writers"), ["Bob"], "{number}");
                    session.execute(diesel::delete(writers::table))?;
                    session.commit()
                })?;
            }
        }
        Ok(())
    });
}

#[test]
fn commit_fails_if_a_hook_takes_the_rows_away() {
    blog(|shop| {
        for prank in PRANKS {
            for hook in ["before_flush", "before_commit"] {
                let outcome = shop.scope().commit_on_ok().run(|| {
                    let session = DB.session()?;
                    session.add(writer("Ada"));
                    match hook {
                        "before_flush" => session.before_flush(move |session, _| prank(session))?,
                        _ => session.before_commit(move || DB.session().map(|session| prank(&session)))?,
                    }
                    Ok(())
                });
                assert_taken_away(outcome, hook);
                assert!(nothing_is_stored(shop));
            }
        }
        Ok(())
    });
}

#[test]
fn hook_after_a_flush_that_rolls_it_back_fails_it() {
    blog(|shop| {
        in_scopes(shop, |session| {
            for prank in [PRANKS[0], PRANKS[1], PRANKS[3], PRANKS[5]] {
                session.after_flush(move |session, changes| {
                    if changes.of::<Writer>().next().is_some() {
                        prank(session);
                    }
                })?;
                session.add(writer("Ada"));
                assert_taken_away(session.flush(), "after_flush");
                let _ = session.commit();
                assert!(no_writer_is_stored(shop));
                session.rollback()?;
                session.remove()?;
            }
            Ok(())
        })
    });
}

#[test]
fn hook_after_a_flush_may_let_go_of_what_was_sent() {
    blog(|shop| {
        in_scopes(shop, |session| {
            session.after_flush(|session, _| session.expunge_all())?;
            session.add(writer("Ada"));
            session.commit()?;
            assert_eq!(shop.ask("SELECT name AS value FROM writers"), ["Ada"]);
            session.remove()?;
            session.execute(diesel::delete(writers::table))?;
            session.commit()
        })
    });
}

#[test]
fn hook_that_forgets_what_was_written_fails_the_flush() {
    blog(|shop| {
        in_scopes(shop, |session| {
            session.execute(diesel::delete(writers::table))?;
            session.commit()?;
            let ada = session.add(writer("Ada"));
            session.commit()?;
            let ada = session.find::<Writer>(ada.read().id)?;
            session.before_flush(|session, _| session.expire_all())?;
            ada.write().name = "A".into();
            assert_taken_away(session.flush(), "before_flush");
            session.rollback()?;
            session.remove()
        })
    });
}

#[test]
fn commit_inside_a_flush_is_refused_and_a_transaction_left_open_fails_it() {
    blog(|shop| {
        in_scopes(shop, |session| {
            session.after_flush(|session, _| {
                assert_is!(session.commit(), Err(Error::AlreadyFlushing { .. }));
            })?;
            session.add(node(None, "kept"));
            session.commit()?;
            session.remove()
        })?;
        assert_eq!(shop.ask("SELECT label AS value FROM nodes"), ["kept", "kept"]);
        shop.scope().autocommit().run(|| {
            let session = DB.session()?;
            session.before_flush(|session, _| session.begin())?;
            session.add(writer("Ada"));
            assert_is!(session.flush(), Err(Error::HookFailed { hook: "before_flush", committed: false, .. }));
            assert_is!(session.commit(), Err(Error::RollbackRequired { .. }));
            session.rollback()?;
            session.remove()?;
            session.add(writer("Bob"));
            session.flush()
        })?;
        assert_eq!(shop.ask("SELECT name AS value FROM writers"), ["Bob"]);
        Ok(())
    });
}

static VETOED: Database<Conn> =
    connected().before_commit(|session, _| session.rollback()).before_flush(|session, changes| {
        match changes.of::<Writer>().any(|(kind, _)| kind == ChangeKind::Delete) {
            true => session.rollback(),
            false => Ok(()),
        }
    });

#[test]
fn hooks_of_the_database_object_are_watched_too() {
    blog(|shop| {
        let id = crate::fixtures::unique("vetoed");
        let app = VETOED.init_app(&id, Config::new(shop.url()))?;
        let outcome = app.context(|| {
            let session = VETOED.session()?;
            session.add(writer("Ada"));
            assert_taken_away(session.commit(), "before_commit");
            let ada = session.add(writer("Ada"));
            session.flush()?;
            session.delete(&ada)?;
            assert_taken_away(session.flush(), "before_flush");
            session.rollback()
        });
        VETOED.remove_app(&id)?;
        outcome?;
        assert!(nothing_is_stored(shop));
        Ok(())
    });
}
