//! For how long a value that was read is valid, and what becomes of writes to an outdated one.

use diesel_session::Tracked;
use diesel_session::testing::TestIsolation;
use diesel_session::unit_of_work::RowState;

use super::*;

for_each_database!(postgres, mariadb, any_postgres, any_mariadb =>
    retry_after_a_flush_that_was_rolled_back_reads_the_row_again,
);

/// A row without a version, read by raw SQL too.
#[derive(Debug, Clone, PartialEq, Queryable, QueryableByName, Selectable, diesel_session::Entity)]
#[diesel(table_name = countries, primary_key(code))]
#[entity(connection = AnyConnection)]
pub struct Nation {
    pub code: String,
    pub name: String,
    pub people: i64,
}

/// One row without a version: name "known", 100 people. One with a version: name "Ada", no email.
fn with_rows(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
    with_rows_and(|config| config, body);
}

fn with_rows_and(options: impl FnOnce(Config) -> Config, body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
    let setup = setup(&DB, KIND, options).map(|setup| setup.fixture(Fixture::sql("blog", tables(KIND))));
    run_test(setup, KIND, |shop| {
        elsewhere(
            shop,
            "INSERT INTO countries (code, name, people, area, landlocked, flag) VALUES ('nl', 'known', 100, 0, false, '')",
        );
        elsewhere(
            shop,
            "INSERT INTO countries (code, name, people, area, landlocked, flag) VALUES ('be', 'other', 100, 0, false, '')",
        );
        elsewhere(shop, "INSERT INTO writers (name) VALUES ('Ada')");
        body(shop)
    });
}

/// What a plain client finds.
fn stored(shop: &Shop<Conn>) -> (String, i64) {
    let row = shop.ask("SELECT name AS value FROM countries WHERE code = 'nl'");
    let people = match KIND {
        Kind::Mariadb => "CAST(people AS CHAR)",
        Kind::Postgres | Kind::Sqlite => "CAST(people AS TEXT)",
    };
    let people = shop.ask(&format!("SELECT {people} AS value FROM countries WHERE code = 'nl'"));
    (row[0].clone(), people[0].parse().expect("a number"))
}

fn email(shop: &Shop<Conn>) -> String {
    shop.ask("SELECT COALESCE(email, 'none') AS value FROM writers")[0].clone()
}

fn nation(session: &Session<Conn>) -> Result<Tracked<Nation>> {
    session.find::<Nation>("nl")
}

fn ada(session: &Session<Conn>) -> Result<Tracked<Writer>> {
    session.track_first::<Writer>(writers::table)
}

/// MariaDB refuses to change what has changed since its snapshot if it is told to.
fn strict(config: Config) -> Config {
    if KIND == Kind::Mariadb {
        config.connection_init_sql("SET SESSION innodb_snapshot_isolation = ON")
    } else {
        config
    }
}

fn refused() -> Error {
    Error::from(diesel::result::Error::NotFound)
}

#[test]
fn write_of_the_value_known_before_a_commit_is_sent() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            session.commit()?;
            elsewhere(shop, "UPDATE countries SET name = 'theirs', people = 7");
            assert_eq!((row.state(), row.read().name.as_str()), (RowState::Expired, "known"));
            row.write().name = "known".into();
            assert_eq!(row.read().people, 7, "it was read before it was written");
            session.commit()?;
            assert_eq!(stored(shop), ("known".into(), 7));
            // The value that is there is no change.
            row.write().name = "known".into();
            assert!(!session.is_dirty());
            session.commit()
        })
    });
}

#[test]
fn update_of_an_outdated_row_starts_from_the_stored_value() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            session.commit()?;
            elsewhere(shop, "UPDATE countries SET people = people + 1000");
            row.update(|row| row.people += 1);
            session.commit()?;
            assert_eq!(stored(shop).1, 1101);
            elsewhere(shop, "UPDATE countries SET people = people + 1000");
            session.expire_all();
            row.try_write()?.people += 1;
            session.commit()?;
            assert_eq!(stored(shop).1, 2102);
            Ok(())
        })
    });
}

#[test]
fn write_of_the_known_value_to_an_outdated_versioned_row_is_stale() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = ada(session)?;
            session.commit()?;
            elsewhere(shop, "UPDATE writers SET email = 'theirs', version = version + 1");
            row.write().email = None;
            assert!(session.is_dirty());
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::Stale && error.entity() == Some("Writer") && error.to_string().contains("so its read at "));
            session.rollback()?;
            // Also where the value is made of one that was known.
            let read = row.read().email.clone();
            row.write().email = Some(format!("{read:?}"));
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::Stale && error.to_string().contains("so its update at "));
            session.rollback()?;
            assert_eq!(email(shop), "theirs");
            // What was read again is what the next write is compared with.
            session.refresh(&row)?;
            row.write().email = Some("mine".into());
            session.commit()?;
            assert_eq!((email(shop).as_str(), row.read().version), ("mine", 3));
            // Another program that does not count versions.
            elsewhere(shop, "UPDATE writers SET email = 'theirs'");
            row.write().email = Some("mine".into());
            session.commit()?;
            assert_eq!((email(shop).as_str(), row.read().version), ("mine", 4));
            row.write().email = Some("mine".into());
            session.commit()?;
            assert_eq!(email(shop), "mine");
            Ok(())
        })
    });
}

/// Changes a row, and gives the row as it is then.
type Change = fn(&Session<Conn>) -> Result<Tracked<Writer>>;

/// Reads a row whose version 2 is then rolled back, and lets another program commit its own version 2.
fn with_a_version_that_was_rolled_back(
    is_savepoint: bool,
    body: impl Fn(&Shop<Conn>, &Session<Conn>, &Tracked<Writer>) -> Result<()>,
) {
    let ways: [Change; 3] = [
        // Code that the session does not know writes.
        |session| {
            raw(session, "UPDATE writers SET email = 'undone', version = version + 1")?;
            ada(session)
        },
        |session| {
            let changes = (writers::email.eq("undone"), writers::version.eq(2));
            session.execute(diesel::update(writers::table).set(changes))?;
            ada(session)
        },
        // The session itself writes, to a handle that it then gives up.
        |session| {
            let row = ada(session)?;
            row.write().email = Some("undone".into());
            session.flush()?;
            session.expunge(&row)?;
            ada(session)
        },
    ];
    for way in ways {
        with_rows(|shop| {
            inside(shop, |session| {
                let mut row = None;
                if is_savepoint {
                    let undone = session.savepoint(|session| {
                        row = Some(way(session)?);
                        Err::<(), _>(refused())
                    });
                    assert!(undone.is_err());
                    session.commit()?;
                } else {
                    row = Some(way(session)?);
                    session.rollback()?;
                }
                let row = row.expect("it was read");
                assert_eq!((row.read().version, row.read().email.as_deref()), (2, Some("undone")));
                elsewhere(shop, "UPDATE writers SET email = 'theirs', version = version + 1");
                body(shop, session, &row)
            })
        });
    }
}

#[test]
fn write_to_a_row_whose_version_was_rolled_back_is_stale() {
    for is_savepoint in [false, true] {
        with_a_version_that_was_rolled_back(is_savepoint, |shop, session, row| {
            row.write().name = "Ada L.".into();
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::Stale && error.entity() == Some("Writer") && error.to_string().contains("so its update at "));
            session.rollback()?;
            session.refresh(row)?;
            assert_eq!(row.read().email.as_deref(), Some("theirs"));
            row.write().name = "Ada L.".into();
            session.commit()?;
            assert_eq!((email(shop).as_str(), row.read().version), ("theirs", 3));
            Ok(())
        });
    }
}

#[test]
fn delete_of_a_row_whose_version_was_rolled_back_is_stale() {
    for is_savepoint in [false, true] {
        with_a_version_that_was_rolled_back(is_savepoint, |shop, session, row| {
            session.delete(row)?;
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::Stale && error.entity() == Some("Writer") && error.to_string().contains("so its delete at "));
            session.rollback()?;
            assert_eq!(email(shop), "theirs");
            session.refresh(row)?;
            session.delete(row)?;
            session.commit()?;
            assert!(shop.ask("SELECT email AS value FROM writers").is_empty());
            Ok(())
        });
    }
}

#[test]
fn write_after_a_rollback_to_a_row_that_is_as_it_was_is_sent() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = ada(session)?;
            raw(session, "UPDATE countries SET name = 'undone'")?;
            let same = ada(session)?;
            session.rollback()?;
            row.write().email = Some("mine".into());
            session.commit()?;
            assert_eq!((email(shop).as_str(), same.read().version), ("mine", 2));
            raw(session, "UPDATE countries SET name = 'undone'")?;
            ada(session)?;
            session.rollback()?;
            session.delete(&row)?;
            session.commit()
        })
    });
}

#[test]
fn write_after_a_statement_or_an_undone_savepoint_is_sent() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            let undone = session.savepoint(|session| {
                session.execute(diesel::update(countries::table.find("nl")).set(countries::name.eq("inside")))?;
                assert_eq!(nation(session)?.read().name, "inside");
                Err::<(), _>(refused())
            });
            assert!(undone.is_err());
            row.write().name = "inside".into();
            session.commit()?;
            assert_eq!(stored(shop).0, "inside");

            let row = nation(session)?;
            let undone = session.savepoint(|session| {
                raw(session, "UPDATE countries SET name = 'raw'")?;
                session.savepoint(|session| nation(session).map(drop))?;
                Err::<(), _>(refused())
            });
            assert!(undone.is_err());
            row.write().name = "raw".into();
            session.commit()?;
            assert_eq!(stored(shop).0, "raw");

            let row = nation(session)?;
            session.execute(diesel::update(countries::table.find("nl")).set(countries::name.eq("executed")))?;
            row.write().name = "raw".into();
            session.commit()?;
            assert_eq!(stored(shop).0, "raw");

            nation(session)?;
            session.expire(&row)?;
            raw(session, "UPDATE countries SET name = 'raw again'")?;
            row.write().name = "raw".into();
            session.commit()?;
            assert_eq!(stored(shop).0, "raw");
            Ok(())
        })
    });
}

#[test]
fn write_to_a_row_that_is_gone_is_stale() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            let versioned = ada(session)?;
            session.commit()?;
            elsewhere(shop, "DELETE FROM countries WHERE code = 'nl'");
            row.write().name = "known".into();
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::Stale && error.entity() == Some("Nation"));
            session.rollback()?;
            row.write().name = "changed".into();
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::Stale && error.to_string().contains("so its update at "));
            session.rollback()?;
            elsewhere(shop, "DELETE FROM writers");
            versioned.write().email = None;
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::Stale && error.entity() == Some("Writer"));
            session.rollback()
        })
    });
}

#[test]
fn write_while_the_session_is_busy_is_verified_by_the_flush() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            // The row is as it was known.
            session.with(|_| {
                row.write().people += 1;
                Ok(())
            })?;
            session.commit()?;
            assert_eq!(stored(shop), ("known".into(), 101));
            // It is not: code that has the connection changed it, and another connection.
            for written_before in [false, true] {
                nation(session)?;
                session.no_autoflush(|session| {
                    if written_before {
                        row.write().name = "mine".into();
                    }
                    session.with(|conn| {
                        diesel::update(countries::table).set(countries::people.eq(7)).execute(conn)?;
                        row.write().people = 101;
                        Ok(())
                    })
                })?;
                assert_error!(session.flush(), Stale);
                session.rollback()?;
            }
            elsewhere(shop, "UPDATE countries SET people = 8");
            let connection = session.connection()?;
            row.write().name = "mine".into();
            drop(connection);
            assert_error!(session.commit(), Stale);
            session.rollback()?;
            assert_eq!(stored(shop), ("known".into(), 8));
            row.write().name = "mine".into();
            session.commit()?;
            assert_eq!(stored(shop), ("mine".into(), 8));
            Ok(())
        })
    });
}

#[test]
fn write_by_a_hook_of_a_commit_or_a_flush_starts_from_the_stored_value() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            session.commit()?;
            elsewhere(shop, "UPDATE countries SET people = 7");
            let hooked = row.clone();
            session.after_commit(move || hooked.update(|row| row.people += 1))?;
            session.commit()?;
            session.commit()?;
            assert_eq!(stored(shop).1, 8);
            elsewhere(shop, "UPDATE countries SET people = 10");
            let hooked = row.clone();
            session.before_flush(move |_, _| hooked.update(|row| row.people += 1))?;
            session.add(node(None, "something to flush"))?;
            session.commit()?;
            assert_eq!(stored(shop).1, 11);
            Ok(())
        })
    });
}

#[test]
fn row_read_outside_of_a_transaction_is_read_each_time_in_an_autocommit_scope() {
    with_rows(|shop| {
        shop.scope().autocommit().run(|| {
            let session = DB.session()?;
            let row = nation(&session)?;
            assert_eq!((row.state(), row.read().people), (RowState::Expired, 100));
            elsewhere(shop, "UPDATE countries SET people = 7");
            assert_eq!((nation(&session)?, row.read().people), (row.clone(), 7));
            elsewhere(shop, "UPDATE countries SET people = 8");
            let found = session.get_many::<Nation>(["be", "none", "nl"])?;
            assert!(found[0].is_some() && found[1].is_none());
            assert_eq!((found[2].as_ref(), row.read().people), (Some(&row), 8));
            elsewhere(shop, "UPDATE countries SET people = 9");
            session.preload::<Nation>(["nl", "none"])?;
            assert_eq!((row.state(), row.read().people), (RowState::Expired, 9));
            elsewhere(shop, "UPDATE countries SET people = 10");
            let tracked =
                session.track::<Nation>(countries::table.order(countries::code).select(Nation::as_select()))?;
            assert_eq!((&tracked[1], row.read().people), (&row, 10));
            session.refresh(&row)?;
            // A write is sent for itself, with a row that is read first.
            elsewhere(shop, "UPDATE countries SET people = 20, name = 'theirs'");
            row.update(|row| row.people += 1);
            row.write().name = "known".into();
            session.flush()?;
            assert_eq!(stored(shop), ("known".into(), 21));
            // And is compared with that row, whatever came in between.
            row.write().name = "known".into();
            nation(&session)?;
            assert!(!session.is_dirty());
            Ok(())
        })
    });
}

#[test]
fn begin_transaction_and_retry_know_nothing_of_what_was_read_outside() {
    with_rows(|shop| {
        let scopes =
            [shop.scope().autocommit(), shop.scope().autocommit().isolation(Isolation::Serializable), shop.scope()];
        for (number, scope) in (1..).zip(scopes) {
            if number == 3 && KIND != Kind::Sqlite {
                // Reading has begun the transaction.
                continue;
            }
            elsewhere(shop, "UPDATE countries SET people = 100, name = 'known'");
            scope.run(|| {
                let session = DB.session()?;
                nation(&session)?;
                elsewhere(shop, "UPDATE countries SET people = 1100");
                session.transaction(|session| {
                    nation(session)?.update(|row| row.people += 1);
                    Ok::<_, Error>(())
                })?;
                assert_eq!(stored(shop).1, 1101, "{number}");
                let row = nation(&session)?;
                elsewhere(shop, "UPDATE countries SET people = 1200");
                session.begin()?;
                assert_eq!(row.state(), RowState::Expired);
                row.update(|row| row.people += 1);
                assert_eq!(row.state(), RowState::Persistent);
                session.commit()?;
                assert_eq!(stored(shop).1, 1201, "{number}");
                let row = nation(&session)?;
                session.commit()?;
                elsewhere(shop, "UPDATE countries SET people = 1300, name = 'theirs'");
                session.retry(3, |session| {
                    let known = session.track::<Nation>(countries::table.select(Nation::as_select()))?;
                    assert!(known.contains(&row));
                    row.write().people += 1;
                    row.write().name = "known".into();
                    Ok::<_, Error>(())
                })?;
                assert_eq!(stored(shop), ("known".into(), 1301), "{number}");
                Ok::<_, Error>(())
            })?;
        }
        Ok(())
    });
}

#[test]
fn write_begins_a_transaction_that_keeps_what_was_read_in_it() {
    with_rows(|shop| {
        inside(shop, |session| {
            let (row, other) = (nation(session)?, session.find::<Nation>("be")?);
            elsewhere(shop, "UPDATE countries SET people = 7 WHERE code = 'nl'");
            other.write().name = "changed".into();
            session.flush()?;
            assert_eq!((row.state(), nation(session)?.read().people), (RowState::Persistent, 100));
            session.commit()
        })
    });
}

/// What `body` does to a row that was read before the `retry`, while another connection adds a thousand.
fn adds_one_after_a_thousand(
    isolation: Option<Isolation>,
    interferes_inside: bool,
    body: impl Fn(&Session<Conn>, &Tracked<Nation>) -> Result<()>,
) {
    with_rows_and(strict, |shop| {
        let scope = isolation.map_or(shop.scope(), |isolation| shop.scope().isolation(isolation));
        scope.run(|| {
            let session = DB.session()?;
            let row = nation(&session)?;
            session.commit()?;
            let interfere = || elsewhere(shop, "UPDATE countries SET people = people + 1000 WHERE code = 'nl'");
            // On SQLite no other connection writes after a transaction has begun.
            let inside = interferes_inside && KIND != Kind::Sqlite;
            if !inside {
                interfere();
            }
            let mut attempts = 0;
            session.retry(5, |session| {
                attempts += 1;
                if inside && attempts == 1 {
                    // The transaction's snapshot is from before.
                    session.count(nodes::table)?;
                    interfere();
                }
                body(session, &row)
            })?;
            assert_eq!(stored(shop).1, 1101, "{attempts} attempts");
            Ok::<_, Error>(())
        })
    });
}

#[test]
fn retry_of_an_update_of_a_handle_from_before_loses_nothing() {
    for isolation in [None, Some(Isolation::RepeatableRead), Some(Isolation::Serializable)] {
        adds_one_after_a_thousand(isolation, false, |session, row| {
            row.update(|row| row.people += 1);
            session.flush()
        });
        if isolation != Some(Isolation::Serializable) || KIND == Kind::Postgres {
            // Under SERIALIZABLE MariaDB's readers lock rows, so no other connection interferes.
            adds_one_after_a_thousand(isolation, true, |_, row| {
                row.update(|row| row.people += 1);
                Ok(())
            });
        }
    }
}

#[test]
fn retry_of_a_read_and_a_write_of_a_handle_from_before_loses_nothing() {
    for isolation in [None, Some(Isolation::RepeatableRead), Some(Isolation::Serializable)] {
        adds_one_after_a_thousand(isolation, false, |_, row| {
            row.write().people = row.read().people + 1;
            Ok(())
        });
        if isolation != Some(Isolation::Serializable) || KIND == Kind::Postgres {
            adds_one_after_a_thousand(isolation, true, |session, row| {
                let people = row.try_read()?.people;
                row.try_write()?.people = people + 1;
                session.flush()
            });
        }
    }
}

#[test]
fn retry_of_a_versioned_handle_from_before_loses_nothing() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = ada(session)?;
            session.commit()?;
            elsewhere(shop, "UPDATE writers SET email = 'theirs', version = version + 1");
            session.retry(3, |_| {
                row.update(|row| row.email = row.email.take().map(|email| email + " and mine"));
                Ok::<_, Error>(())
            })?;
            assert_eq!(email(shop), "theirs and mine");
            elsewhere(shop, "UPDATE writers SET email = 'theirs', version = version + 1");
            session.retry(3, |_| {
                let email = row.read().email.clone();
                row.write().email = email.map(|email| email + " too");
                Ok::<_, Error>(())
            })?;
            assert_eq!(email(shop), "theirs too");
            elsewhere(shop, "UPDATE writers SET email = 'theirs', version = version + 1");
            session.retry(3, |session| session.delete(&row))?;
            assert!(shop.ask("SELECT name AS value FROM writers").is_empty());
            Ok(())
        })
    });
}

/// The first attempt has flushed its UPDATE, so that the row's value is one that was rolled back.
// Not on SQLite: no other connection writes meanwhile.
fn retry_after_a_flush_that_was_rolled_back_reads_the_row_again() {
    with_rows_and(strict, |shop| {
        shop.scope().isolation(Isolation::RepeatableRead).run(|| {
            let session = DB.session()?;
            let row = nation(&session)?;
            session.commit()?;
            let mut states = Vec::new();
            session.retry(3, |session| {
                states.push(row.state());
                session.count(countries::table)?;
                row.update(|row| row.people += 1);
                session.flush()?;
                if states.len() == 1 {
                    elsewhere(shop, "UPDATE countries SET people = 7 WHERE code = 'be'");
                }
                let statement = diesel::update(countries::table.find("be")).set(countries::people.eq(8));
                session.execute(statement)
            })?;
            assert_eq!(states, [RowState::Expired, RowState::RolledBack]);
            assert_eq!(stored(shop).1, 101);
            Ok::<_, Error>(())
        })
    });
}

#[test]
fn read_in_a_retry_while_the_session_is_busy_is_verified_by_the_commit() {
    with_rows(|shop| {
        inside(shop, |session| {
            let (row, target) = (nation(session)?, session.find::<Nation>("be")?);
            session.commit()?;
            let copy = |session: &Session<Conn>| {
                session.retry(3, |session| {
                    let people = session.with(|_| Ok(row.read().people))?;
                    target.write().people = people + 1;
                    Ok::<_, Error>(())
                })
            };
            copy(session)?;
            assert_eq!(session.find::<Nation>("be")?.read().people, 101);
            session.commit()?;
            elsewhere(shop, "UPDATE countries SET people = 7 WHERE code = 'nl'");
            let error = copy(session).expect_err("the value was outdated");
            assert!(error.database_error().is_none() && error.to_string().contains("Nation \"nl\""), "{error}");
            assert!(!session.in_transaction());
            assert_eq!(session.find::<Nation>("be")?.read().people, 101);
            // By now it is known.
            nation(session)?;
            session.commit()?;
            copy(session)?;
            assert_eq!(session.find::<Nation>("be")?.read().people, 8);
            Ok(())
        })
    });
}

#[test]
fn a_retry_ends_with_its_transaction() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            session.commit()?;
            let (hooked, rolled_back) = (row.clone(), row.clone());
            session.retry(3, |session| {
                let hooked = hooked.clone();
                session.after_commit(move || assert_eq!(hooked.read().people, 100))
            })?;
            // Reading a handle sends nothing after the attempt, so it begins nothing.
            assert!(!session.in_transaction());
            let failed = session.retry(3, |session| {
                let rolled_back = rolled_back.clone();
                session.after_rollback(move || assert_eq!(rolled_back.read().people, 100))?;
                Err::<(), _>(refused())
            });
            assert!(failed.is_err() && !session.in_transaction());
            elsewhere(shop, "UPDATE countries SET people = 7");
            assert_eq!(row.read().people, 100);
            Ok(())
        })
    });
}

#[test]
fn rows_of_raw_sql_replace_known_values() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            let lock = match KIND {
                Kind::Sqlite => "",
                Kind::Postgres | Kind::Mariadb => " FOR UPDATE",
            };
            elsewhere(shop, "UPDATE countries SET people = 1100");
            let query = format!("SELECT * FROM countries WHERE code = 'nl'{lock}");
            let tracked = session.track::<Nation>(sql_query(&query))?;
            assert_eq!((&tracked[0], row.read().people), (&row, 1100));
            row.update(|row| row.people += 1);
            session.commit()?;
            assert_eq!(stored(shop).1, 1101);
            // And by a literal in a typed query.
            let row = nation(session)?;
            elsewhere(shop, "UPDATE countries SET people = 1200");
            let filter = diesel::dsl::sql::<diesel::sql_types::Bool>(match KIND {
                Kind::Sqlite => "1 = 1",
                Kind::Postgres | Kind::Mariadb => "true FOR UPDATE",
            });
            session.track::<Nation>(countries::table.select(Nation::as_select()).filter(filter))?;
            assert_eq!(row.read().people, 1200);
            row.update(|row| row.people += 1);
            session.commit()?;
            assert_eq!(stored(shop).1, 1201);
            Ok(())
        })
    });
}

#[test]
fn a_row_that_raw_sql_has_locked_is_written_as_it_was_locked() {
    with_rows(|shop| {
        for reads_again in [false, true] {
            inside(shop, |session| {
                let row = nation(session)?;
                let before = row.read().people;
                elsewhere(shop, &format!("UPDATE countries SET people = {}", before + 1000));
                let lock = match KIND {
                    Kind::Sqlite => "",
                    Kind::Postgres | Kind::Mariadb => " FOR UPDATE",
                };
                session.track::<Nation>(sql_query(format!("SELECT * FROM countries WHERE code = 'nl'{lock}")))?;
                // A statement after which no row is known, and a query that the snapshot of the transaction answers.
                raw(session, "UPDATE writers SET email = 'other'")?;
                if reads_again {
                    nation(session)?;
                }
                row.update(|row| row.people += 1);
                session.commit()?;
                assert_eq!(stored(shop).1, before + 1001, "{reads_again}");
                Ok(())
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_statement_is_refused_while_a_row_is_being_written() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            let known = row.read().people;
            session.no_autoflush(|session| {
                let mut guard = row.write();
                assert_error!(raw(session, "UPDATE countries SET people = 7"), WriteInProgress);
                let update = diesel::update(countries::table).set(countries::people.eq(7));
                assert_error!(session.execute(update), WriteInProgress);
                assert_error!(session.connection().map(drop), WriteInProgress);
                // What only reads is not.
                assert_eq!(session.count(countries::table.find("nl"))?, 1);
                guard.people = known;
                drop(guard);
                raw(session, "UPDATE countries SET people = 7")?;
                row.write().people = known;
                Ok::<_, Error>(())
            })?;
            session.commit()?;
            assert_eq!(stored(shop).1, known);
            Ok(())
        })
    });
}

#[test]
fn a_second_session_of_the_same_context_keeps_its_own_values() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            session.commit()?;
            let other = shop.open_session()?;
            nation(&other)?.write().people = 7;
            other.commit()?;
            row.update(|row| row.people += 1);
            session.commit()?;
            assert_eq!(stored(shop).1, 8);
            Ok(())
        })
    });
}

#[test]
fn a_read_only_scope_reads_and_refuses_what_was_written() {
    with_rows(|shop| {
        shop.scope().read_only().run(|| {
            let session = DB.session()?;
            let row = nation(&session)?;
            session.commit()?;
            elsewhere(shop, "UPDATE countries SET people = 7");
            row.update(|row| row.people += 1);
            assert!(session.flush().is_err());
            session.rollback()?;
            assert_eq!(nation(&session)?.read().people, 7);
            Ok::<_, Error>(())
        })?;
        assert_eq!(stored(shop).1, 7);
        Ok(())
    });
}

/// In a test that is rolled back other sessions of its application are the others.
#[test]
fn rolled_back_test_knows_rows_for_as_long_as_production() {
    let setup = setup(&DB, KIND, |config| config)
        .map(|setup| setup.fixture(Fixture::sql("blog", tables(KIND))).isolation(TestIsolation::Rollback));
    let Some(setup) = setup else { return };
    let test = setup.start().expect("the kit starts");
    let change = |people: i64| {
        test.run(|| DB.session()?.execute(diesel::update(countries::table).set(countries::people.eq(people))))
    };
    let outcome = test.context(|| {
        let session = DB.session()?;
        raw(
            &session,
            "INSERT INTO countries (code, name, people, area, landlocked, flag) VALUES ('nl', 'known', 100, 0, false, '')",
        )?;
        session.commit()?;
        let row = nation(&session)?;
        change(7)?;
        assert_eq!(nation(&session)?.read().people, 100, "it was read in this transaction");
        session.transaction(|session| {
            // MariaDB's transaction has begun with the read, the others have read outside of it.
            assert_eq!(nation(session)?.read().people, if KIND == Kind::Mariadb { 100 } else { 7 });
            Ok::<_, Error>(())
        })?;
        assert_eq!(nation(&session)?.read().people, 7);
        session.commit()?;
        change(1100)?;
        session.retry(3, |_| {
            row.write().people = row.read().people + 1;
            Ok::<_, Error>(())
        })?;
        assert_eq!(nation(&session)?.read().people, 1101);
        session.commit()?;
        change(8)?;
        row.write().people = 1101;
        session.commit()?;
        assert_eq!(nation(&session)?.read().people, 1101);
        session.commit()
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    let outcome = test.scope().autocommit().run(|| {
        let session = DB.session()?;
        nation(&session)?;
        change(9)?;
        assert_eq!(nation(&session)?.read().people, 9);
        Ok::<_, Error>(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    test.finish().unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn unflushed_write_is_kept_and_the_rest_of_the_row_is_refreshed() {
    with_rows(|shop| {
        inside(shop, |session| {
            let (row, versioned) = (nation(session)?, ada(session)?);
            session.no_autoflush(|session| {
                row.write().name = "mine".into();
                session.execute(diesel::update(countries::table).set(countries::people.eq(1100)))?;
                assert_eq!(nation(session)?, row);
                assert_eq!((row.read().name.as_str(), row.read().people), ("mine", 1100));
                session.execute(diesel::update(countries::table).set(countries::people.eq(1200)))?;
                row.update(|row| row.people += 1);
                // With a version, what was read for the write has to be there still.
                versioned.write().email = Some("mine".into());
                raw(session, "UPDATE writers SET version = version + 1")?;
                ada(session)?;
                assert_eq!(versioned.read().version, 1);
                Ok::<_, Error>(())
            })?;
            assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::Stale && error.entity() == Some("Writer"));
            session.rollback()?;
            let row = nation(session)?;
            session.no_autoflush(|session| {
                row.write().name = "mine".into();
                session.execute(diesel::update(countries::table).set(countries::people.eq(1200)))?;
                row.update(|row| row.people += 1);
                Ok::<_, Error>(())
            })?;
            session.commit()?;
            assert_eq!(stored(shop), ("mine".into(), 1201));
            Ok(())
        })
    });
}

/// Fewer columns of the same table.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, diesel_session::Entity)]
#[diesel(table_name = countries, primary_key(code))]
#[entity(connection = AnyConnection)]
pub struct NationName {
    pub code: String,
    pub name: String,
}

#[test]
fn a_flush_outdates_the_handles_of_other_entities_of_the_table() {
    with_rows(|shop| {
        inside(shop, |session| {
            let row = nation(session)?;
            let name = session.find::<NationName>("nl")?;
            name.write().name = "renamed".into();
            session.flush()?;
            assert_eq!(row.state(), RowState::Expired);
            assert_eq!(nation(session)?.read().name, "renamed");
            name.write().name = "again".into();
            session.flush()?;
            // The value that was known is a change.
            row.write().name = "renamed".into();
            session.commit()?;
            assert_eq!(stored(shop).0, "renamed");
            let name = session.find::<NationName>("nl")?;
            session.delete(&nation(session)?)?;
            session.flush()?;
            assert!(session.get::<NationName>("nl")?.is_none());
            assert_eq!(name.state(), RowState::Deleted);
            session.rollback()
        })
    });
}
