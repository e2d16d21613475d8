//! Code of the program's own that panics, or that uses the session, wherever it runs.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::panic::resume_unwind;

use diesel::backend::Backend;
use diesel::deserialize::{self, FromSql, FromSqlRow};
use diesel::expression::AsExpression;
use diesel::serialize::{self, Output, ToSql};
use diesel_session::Entity;
use diesel_session::unit_of_work::RowState;

use super::*;

diesel::table! { fused (code) { code -> Text, name -> Text, version -> Integer, } }

/// Text, whose code panics or uses the session when it is told to.
#[derive(AsExpression, FromSqlRow)]
#[diesel(sql_type = Text)]
pub struct Fuse(String);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Clone,
    Drop,
    Eq,
    Hash,
    Debug,
    ToSql,
    FromSql,
    Display,
}

const ACTS: [Act; 8] = [Act::Clone, Act::Drop, Act::Eq, Act::Hash, Act::Debug, Act::ToSql, Act::FromSql, Act::Display];

thread_local! {
    /// What panics, and after how many times.
    static ARMED: Cell<Option<(Act, u32)>> = const { Cell::new(None) };
    /// What a `Drop` does with the session.
    static ON_DROP: RefCell<Option<Session<Conn>>> = const { RefCell::new(None) };
}

fn done(act: Act) {
    let Ok(Some((armed, times))) = ARMED.try_with(Cell::get) else { return };
    let is_error = armed == Act::Display && act == Act::ToSql;
    if armed != act && !is_error {
        return;
    }
    if times > 0 {
        ARMED.set(Some((armed, times - 1)));
    } else if !is_error {
        ARMED.set(None);
        // The panic hook would write a backtrace for each of thousands.
        resume_unwind(Box::new(format!("{act:?}")));
    }
}

/// An error that cannot be shown.
struct Unspeakable;

impl fmt::Debug for Unspeakable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Unspeakable")
    }
}

impl fmt::Display for Unspeakable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        resume_unwind(Box::new("Display".to_owned()))
    }
}

impl std::error::Error for Unspeakable {}

impl Clone for Fuse {
    fn clone(&self) -> Self {
        done(Act::Clone);
        Self(self.0.clone())
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        // Not for keys that this itself makes.
        let session = ON_DROP.try_with(RefCell::take).ok().flatten();
        if let Some(session) = session {
            // Whatever it answers, it is an answer.
            let _ = session.get::<Node>(1);
            let _ = session.track::<Writer>(writers::table);
            let _ = session.get::<Fused>("a");
            let _ = (session.is_dirty(), session.changes().len());
            ON_DROP.replace(Some(session));
        }
        done(Act::Drop);
    }
}

impl PartialEq for Fuse {
    fn eq(&self, other: &Self) -> bool {
        done(Act::Eq);
        self.0 == other.0
    }
}

impl Eq for Fuse {}

impl Hash for Fuse {
    fn hash<H: Hasher>(&self, state: &mut H) {
        done(Act::Hash);
        self.0.hash(state);
    }
}

impl fmt::Debug for Fuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        done(Act::Debug);
        self.0.fmt(f)
    }
}

impl<DB: Backend> ToSql<Text, DB> for Fuse
where
    String: ToSql<Text, DB>,
{
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, DB>) -> serialize::Result {
        done(Act::ToSql);
        if ARMED.get() == Some((Act::Display, 0)) {
            ARMED.set(None);
            return Err(Unspeakable.into());
        }
        self.0.to_sql(out)
    }
}

impl<DB: Backend> FromSql<Text, DB> for Fuse
where
    String: FromSql<Text, DB>,
{
    fn from_sql(bytes: DB::RawValue<'_>) -> deserialize::Result<Self> {
        done(Act::FromSql);
        String::from_sql(bytes).map(Self)
    }
}

impl From<&str> for Fuse {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = fused, primary_key(code))]
#[entity(new = NewFused, connection = AnyConnection)]
pub struct Fused {
    code: Fuse,
    name: Fuse,
    #[entity(version)]
    version: i32,
}

fn new(code: &str) -> NewFused {
    NewFused { code: code.into(), name: "new".into() }
}

/// Rows `a` and `b`.
const RESET: &str = "DELETE FROM fused; INSERT INTO fused VALUES ('a', 'old', 1), ('b', 'old', 1)";

/// A connection on which code panicked is closed; its transaction, and its locks, may be there for a moment.
fn reset(shop: &Shop<Conn>) {
    assert_eq!(shop.open_transactions(), 0);
    elsewhere(shop, RESET);
}

type Step = fn(&Session<Conn>) -> Result<()>;

/// One transaction, step by step, with what the table has when the steps so far are committed.
const STEPS: [(Step, &str); 14] = [
    (|session| session.find::<Fused>("a").map(drop), "a old, b old"),
    (
        |session| {
            session.find::<Fused>("a")?.write().name = "written".into();
            Ok(())
        },
        "a written, b old",
    ),
    (
        |session| {
            // A snapshot makes the flush clone the row.
            let _snapshot = session.find::<Fused>("a")?.read();
            session.add(new("c"))?;
            session.flush()
        },
        "a written, b old, c new",
    ),
    (
        |session| {
            session.savepoint(|session| {
                session.add(new("d"))?;
                session.find::<Fused>("b")?.write().name = "written".into();
                Ok(())
            })
        },
        "a written, b written, c new, d new",
    ),
    (
        |session| {
            let undone = session.savepoint(|session| {
                session.find::<Fused>("c")?.write().name = "undone".into();
                session.delete(&session.find::<Fused>("a")?)?;
                session.add(new("e"))?;
                session.flush()?;
                Err::<(), _>(Error::from(diesel::result::Error::NotFound))
            });
            match undone {
                Err(error) if error.is_not_found() => Ok(()),
                other => other,
            }
        },
        "a written, b written, c new, d new",
    ),
    (|session| session.track::<Fused>(fused::table).map(drop), "a written, b written, c new, d new"),
    (|session| session.refresh(&session.find::<Fused>("c")?), "a written, b written, c new, d new"),
    (
        |session| {
            session.find::<Fused>("c")?.update(|c| c.name = "twice".into());
            Ok(())
        },
        "a written, b written, c twice, d new",
    ),
    (
        |session| {
            session.delete(&session.find::<Fused>("b")?)?;
            session.flush()
        },
        "a written, c twice, d new",
    ),
    (
        |session| {
            session.get_many::<Fused>(["a", "b", "c"])?;
            session.expire(&session.find::<Fused>("d")?)
        },
        "a written, c twice, d new",
    ),
    (|session| session.delete(&session.find::<Fused>("c")?), "a written, d new"),
    (
        |session| {
            session.find::<Fused>("d")?.write().name = "written".into();
            session.flush()
        },
        "a written, d written",
    ),
    (
        |session| {
            // The same key once more.
            session.add(new("c"))?;
            session.flush()
        },
        "a written, c new, d written",
    ),
    (|session| session.commit(), "a written, c new, d written"),
];

/// What a plain client sees.
fn stored(shop: &Shop<Conn>) -> String {
    let concat = match KIND {
        Kind::Mariadb => "CONCAT(code, ' ', name)",
        Kind::Postgres | Kind::Sqlite => "code || ' ' || name",
    };
    shop.ask(&format!("SELECT {concat} AS value FROM fused ORDER BY code")).join(", ")
}

fn scenario(session: &Session<Conn>, steps: &Cell<usize>) -> Result<()> {
    for (at, (step, _)) in STEPS.iter().enumerate() {
        step(session)?;
        steps.set(at + 1);
    }
    Ok(())
}

fn run(session: &Session<Conn>, steps: &Cell<usize>) -> Option<Result<()>> {
    catch_unwind(AssertUnwindSafe(|| scenario(session, steps))).ok()
}

const BEFORE: &str = "a old, b old";
const AFTER: &str = "a written, c new, d written";

/// A test with the table of what panics.
fn fused(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
    blog(|shop| {
        let text = if KIND == Kind::Mariadb { "VARCHAR(100)" } else { "TEXT" };
        elsewhere(
            shop,
            &format!(
                "CREATE TABLE fused (code {text} PRIMARY KEY, name {text} NOT NULL, version INTEGER NOT NULL DEFAULT 1)"
            ),
        );
        body(shop)
    });
}

/// Arms every kind of code at every time it runs. `then` is what the program does after the panic.
fn at_every_time(shop: &Shop<Conn>, then: impl Fn(&Session<Conn>, Act, u32, usize) -> Result<()>) -> Result<()> {
    for act in ACTS {
        for time in 0.. {
            reset(shop);
            let went_off = shop.context(|| {
                let session = DB.session()?;
                let steps = Cell::new(0);
                ARMED.set(Some((act, time)));
                let outcome = run(&session, &steps);
                let went_off = ARMED.take().is_none();
                if matches!(outcome, Some(Ok(()))) {
                    // It was contained, or there was nothing to panic.
                    assert_eq!(stored(shop), AFTER, "{act:?} {time}");
                } else {
                    then(&session, act, time, steps.get())?;
                }
                Ok::<_, Error>(went_off)
            })?;
            if !went_off {
                assert!(time > 3 || act == Act::Debug, "{act:?} hardly ever runs");
                break;
            }
        }
    }
    Ok(())
}

#[test]
fn after_a_panic_and_a_rollback_everything_can_be_written_again() {
    fused(|shop| {
        at_every_time(shop, |session, act, time, _| {
            session.rollback()?;
            let left = stored(shop);
            assert!(left == BEFORE || left == AFTER, "{act:?} {time}: {left}");
            reset(shop);
            session.rollback()?;
            let outcome = scenario(session, &Cell::new(0));
            assert!(outcome.is_ok(), "{act:?} {time}: {outcome:?}");
            assert_eq!(stored(shop), AFTER, "{act:?} {time}");
            Ok(())
        })
    });
}

#[test]
fn commit_after_a_panic_stores_whole_steps_or_fails() {
    fused(|shop| {
        at_every_time(shop, |session, act, time, steps| {
            let committed = session.commit();
            let left = stored(shop);
            match committed {
                Ok(()) => {
                    let before = if steps == 0 { BEFORE } else { STEPS[steps - 1].1 };
                    assert!(left == before || left == STEPS[steps].1, "{act:?} {time}, step {steps}: {left}");
                }
                Err(error) => {
                    assert!(left == BEFORE || left == AFTER, "{act:?} {time}: {left} after {error}");
                    session.rollback()?;
                }
            }
            Ok(())
        })
    });
}

#[test]
fn panics_in_a_flush_that_is_its_own_transaction_leave_nothing() {
    fused(|shop| {
        for act in ACTS {
            for time in 0.. {
                reset(shop);
                let went_off = shop.scope().autocommit().run(|| {
                    let session = DB.session()?;
                    let flush = || {
                        // First, as a query flushes.
                        let (a, b) = (session.find::<Fused>("a")?, session.find::<Fused>("b")?);
                        let _snapshot = a.read();
                        a.write().name = "written".into();
                        session.add(new("c"))?;
                        session.delete(&b)?;
                        session.flush()
                    };
                    ARMED.set(Some((act, time)));
                    let outcome = catch_unwind(AssertUnwindSafe(flush));
                    let went_off = ARMED.take().is_none();
                    let left = stored(shop);
                    let after = "a written, c new";
                    match outcome {
                        Ok(Ok(())) => assert_eq!(left, after, "{act:?} {time}"),
                        _ => assert!(left == BEFORE || left == after, "{act:?} {time}: {left}"),
                    }
                    session.rollback()?;
                    reset(shop);
                    session.expire_all();
                    flush()?;
                    assert_eq!(stored(shop), after, "{act:?} {time}");
                    Ok::<_, Error>(went_off)
                })?;
                if !went_off {
                    break;
                }
            }
        }
        Ok(())
    });
}

/// A program that gives up the row that cannot be sent does not commit the statements that were sent before it.
#[test]
fn flush_whose_error_cannot_be_shown_has_to_be_rolled_back() {
    fused(|shop| {
        for time in 0.. {
            reset(shop);
            let went_off = shop.context(|| {
                let session = DB.session()?;
                session.find::<Fused>("a")?.write().name = "written".into();
                let added = session.add(new("c"))?;
                ARMED.set(Some((Act::Display, time)));
                let outcome = catch_unwind(AssertUnwindSafe(|| session.flush()));
                let went_off = ARMED.take().is_none();
                if went_off {
                    assert!(matches!(outcome, Ok(Err(_))), "{time}: the panic is contained");
                    let _ = session.expunge(&added);
                    assert_error!(session.commit(), RollbackRequired);
                }
                session.rollback()?;
                Ok::<_, Error>(went_off)
            })?;
            assert_eq!(stored(shop), BEFORE, "{time}");
            if !went_off {
                assert!(time > 3, "values of both statements fail");
                return Ok(());
            }
        }
        Ok(())
    });
}

#[test]
fn session_ends_although_every_row_panics_when_it_is_dropped() {
    fused(|shop| {
        for time in 0..12 {
            reset(shop);
            let smuggled = shop.context(|| {
                let session = DB.session()?;
                session.track::<Fused>(fused::table)?;
                session.find::<Fused>("a")?.write().name = "written".into();
                session.add(new("c"))?;
                ARMED.set(Some((Act::Drop, time)));
                Ok::<_, Error>(session)
            })?;
            ARMED.set(None);
            assert_error!(smuggled.flush(), SessionEnded);
            assert_error!(smuggled.load::<String>(fused::table.select(fused::code)), SessionEnded);
            assert_eq!(stored(shop), BEFORE);
            // While the thread unwinds, a second panic must not end the process.
            let unwound = catch_unwind(AssertUnwindSafe(|| {
                shop.context(|| -> Result<()> {
                    let session = DB.session()?;
                    session.track::<Fused>(fused::table)?;
                    session.add(new("c"))?;
                    ARMED.set(Some((Act::Drop, time)));
                    resume_unwind(Box::new("the program's own".to_owned()))
                })
            }));
            ARMED.set(None);
            assert!(unwound.is_err());
        }
        Ok(())
    });
}

#[test]
fn drop_that_uses_the_session_finds_no_open_borrow() {
    fused(|shop| {
        reset(shop);
        let smuggled = inside_with_drops(shop, |session| {
            let steps = Cell::new(0);
            scenario(session, &steps)?;
            assert_eq!(stored(shop), AFTER);
            session.track::<Fused>(fused::table)?;
            session.find::<Fused>("a")?.write().name = "undone".into();
            session.add(new("f"))?;
            session.flush()?;
            session.find::<Fused>("a")?.write().name = "never sent".into();
            session.rollback()?;
            session.expunge_all();
            session.find::<Fused>("a")?.write().name = "never sent".into();
            session.expire_all();
            session.find::<Fused>("d")?.write().name = "never sent".into();
            session.remove()?;
            session.find::<Fused>("a").map(drop)
        })?;
        assert_error!(smuggled.flush(), SessionEnded);
        assert_eq!(stored(shop), AFTER);
        Ok(())
    });
}

/// A context in which every row that is dropped uses the session.
fn inside_with_drops(shop: &Shop<Conn>, body: impl FnOnce(&Session<Conn>) -> Result<()>) -> Result<Session<Conn>> {
    let session = shop.context(|| {
        let session = DB.session()?;
        ON_DROP.replace(Some(session.clone()));
        body(&session)?;
        Ok::<_, Error>(session)
    });
    ON_DROP.take();
    session
}

#[test]
fn write_that_was_rolled_back_by_a_panic_of_clone_is_sent_again() {
    fused(|shop| {
        reset(shop);
        inside(shop, |session| {
            let a = session.find::<Fused>("a")?;
            a.write().name = "same".into();
            let snapshot = a.read();
            // The flush clones the row, as the snapshot shares it.
            for time in 0..4 {
                ARMED.set(Some((Act::Clone, time)));
                let _ = catch_unwind(AssertUnwindSafe(|| session.flush()));
                ARMED.set(None);
            }
            drop(snapshot);
            session.rollback()?;
            let a = session.find::<Fused>("a")?;
            assert_eq!(a.state(), RowState::Persistent);
            a.write().name = "same".into();
            session.commit()
        })?;
        assert_eq!(stored(shop), "a same, b old");
        Ok(())
    });
}
