//! The order in which a flush locks rows.

use diesel_session::Entity;

use super::*;

diesel::table! { counters (id) { id -> Integer, value -> Integer, other -> Integer, } }

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(new = NewCounter, connection = AnyConnection)]
pub struct Counter {
    pub id: i32,
    pub value: i32,
    pub other: i32,
}

const COUNTERS: i32 = 24;

/// Whether a flush orders its locks. Elsewhere rows are written one by one, in the order of the program.
fn in_key_order() -> bool {
    std::any::type_name::<Conn>() == std::any::type_name::<PgConnection>()
}

#[track_caller]
fn counters(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
    let rows: Vec<String> = (1..=COUNTERS).map(|id| format!("({id}, 0, 0)")).collect();
    // Rows that were updated are elsewhere in the table than rows that were not.
    let sql = format!(
        "CREATE TABLE counters (id INTEGER PRIMARY KEY, value INTEGER NOT NULL, other INTEGER NOT NULL);
         INSERT INTO counters VALUES {}; UPDATE counters SET value = 0 WHERE id % 3 = 0;",
        rows.join(", ")
    );
    let fixture = Fixture::sql("counters", sql);
    let setup = setup(&DB, KIND, |config| config).map(|setup| setup.max_size(6).fixture(fixture));
    run_test(setup, KIND, body);
}

/// Numbers that look as if they were thrown.
fn thrown(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

/// Runs `change` in six threads for so many rounds, with some of the keys, as they come or sorted.
fn rounds(shop: &Shop<Conn>, change: impl Fn(&Session<Conn>, &[i32], u64) -> Result<()> + Sync) {
    crate::fixtures::threads::together(6, |thread| {
        let mut seed = thread as u64 + 1;
        for _ in 0..60 {
            let mut ids: Vec<i32> = (1..=COUNTERS).filter(|_| thrown(&mut seed).is_multiple_of(3)).collect();
            for at in (1..ids.len()).rev() {
                ids.swap(at, thrown(&mut seed) as usize % (at + 1));
            }
            if !in_key_order() {
                ids.sort_unstable();
            }
            let number = thrown(&mut seed);
            // Other threads may have changed the rows meanwhile. The test is about the order of the locks.
            let outcome = shop.scope().isolation(Isolation::ReadCommitted).run(|| {
                let session = DB.session()?;
                change(&session, &ids, number)?;
                session.commit()
            });
            outcome.unwrap_or_else(|error| panic!("{error}"));
        }
    });
}

#[test]
fn threads_that_update_rows_in_any_order_do_not_deadlock() {
    counters(|shop| {
        if KIND == Kind::Sqlite {
            return Ok(());
        }
        rounds(shop, |session, ids, _| {
            let rows = session.get_many::<Counter>(ids.iter().copied())?;
            rows.iter().flatten().for_each(|row| row.update(|row| row.value += 1));
            Ok(())
        });
        Ok(())
    });
}

#[test]
fn threads_that_write_different_columns_do_not_deadlock() {
    counters(|shop| {
        if KIND == Kind::Sqlite {
            return Ok(());
        }
        rounds(shop, |session, ids, number| {
            let rows = session.get_many::<Counter>(ids.iter().copied())?;
            for (at, row) in rows.iter().flatten().enumerate() {
                row.update(|row| if (at as u64 + number).is_multiple_of(2) { row.value += 1 } else { row.other += 1 });
            }
            Ok(())
        });
        Ok(())
    });
}

#[test]
fn threads_that_delete_and_update_rows_do_not_deadlock() {
    counters(|shop| {
        if KIND == Kind::Sqlite || !in_key_order() {
            // A flush elsewhere has DELETEs before and after its UPDATEs, each in an order of its own.
            return Ok(());
        }
        rounds(shop, |session, ids, _| {
            let rows = session.get_many::<Counter>(ids.iter().copied())?;
            for (at, row) in rows.iter().flatten().enumerate() {
                match at % 3 {
                    0 => session.delete(row)?,
                    _ => row.update(|row| row.value += 1),
                }
            }
            // The second thread finds rows deleted, which is an error of its own.
            match session.flush() {
                Ok(()) => session.rollback(),
                Err(error) if error.is_stale() => session.rollback(),
                Err(error) => Err(error),
            }
        });
        Ok(())
    });
}

#[test]
fn a_lock_that_a_foreign_key_takes_does_not_wait_for_an_update() {
    counters(|shop| {
        if KIND != Kind::Postgres {
            return Ok(());
        }
        elsewhere(shop, "CREATE TABLE children (id INTEGER, counter_id INTEGER REFERENCES counters (id))");
        inside(shop, |session| {
            let rows = session.get_many::<Counter>([1, 2, 3])?;
            rows.iter().flatten().for_each(|row| row.write().value = 7);
            session.flush()?;
            // The other connection waits for no lock.
            elsewhere(shop, "INSERT INTO children VALUES (1, 2)");
            assert!(!shop.other_connection().write("UPDATE counters SET value = 8 WHERE id = 2"));
            session.commit()
        })
    });
}

#[test]
fn rows_are_deleted_by_a_role_that_may_not_update() {
    counters(|shop| {
        if KIND != Kind::Postgres {
            return Ok(());
        }
        inside(shop, |session| {
            raw(session, "REVOKE UPDATE ON counters FROM CURRENT_USER")?;
            let rows = session.get_many::<Counter>([1, 2, 3])?;
            rows.iter().flatten().try_for_each(|row| session.delete(row))?;
            session.commit()
        })?;
        assert_eq!(shop.ask("SELECT 'x' AS value FROM counters").len(), COUNTERS as usize - 3);
        Ok(())
    });
}
