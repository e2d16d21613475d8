//! What a failed flush, a rollback and a savepoint leave in memory.

use diesel_session::unit_of_work::RowState;

use super::*;

#[test]
fn violation_at_commit_is_the_cause_of_each_commit_until_the_rollback() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(country("nl"))?;
            session.commit()?;
            let twice = session.add(country("nl"))?;
            let other = session.add(country("be"))?;
            let first = session.commit().expect_err("the key is taken");
            assert_eq!(kind_of(&first), Some(&DatabaseErrorKind::UniqueViolation));
            let mut texts = Vec::new();
            for _ in 0..5 {
                let error = session.commit().expect_err("it wants a rollback");
                assert!(error.is_rollback_required(), "{error}");
                texts.push(error.to_string());
            }
            texts.dedup();
            assert_eq!(texts.len(), 1);
            let cause = first.database_error().expect("the database's").to_string();
            assert!(
                texts[0].contains(cause.split(['"', '.', '\n']).next().unwrap_or_default()),
                "{} / {cause}",
                texts[0]
            );
            assert_error!(session.load::<String>(countries::table.select(countries::code)), RollbackRequired);
            session.rollback()?;
            assert_eq!(
                (twice.state(), other.state(), ada.state()),
                (RowState::Discarded, RowState::Discarded, RowState::Expired)
            );
            session.add(country("be"))?;
            session.commit()?;
            assert_eq!(session.count(countries::table)?, 2);
            Ok(())
        })
    });
}

#[test]
fn violation_in_a_savepoint_undoes_that_savepoint_only() {
    blog(|shop| {
        inside(shop, |session| {
            let kept = session.add(country("nl"))?;
            let mut inner = None;
            let outcome = session.savepoint(|session| {
                inner = Some((session.add(country("be"))?, session.add(country("nl"))?));
                kept.write().name = "changed".into();
                let first = session.flush().expect_err("the key is taken");
                assert_eq!(kind_of(&first), Some(&DatabaseErrorKind::UniqueViolation));
                for _ in 0..5 {
                    assert_error!(session.flush(), RollbackRequired);
                }
                Err::<(), _>(first)
            });
            assert_eq!(outcome.as_ref().err().and_then(kind_of), Some(&DatabaseErrorKind::UniqueViolation));
            let (be, nl) = inner.expect("it ran");
            assert_eq!((be.state(), nl.state()), (RowState::Discarded, RowState::Discarded));
            assert_eq!(session.find::<Country>("nl")?.read().name, "a country");
            // Its own flush, at the end of the closure, may fail as well.
            let outcome = session.savepoint(|session| {
                session.add(country("nl"))?;
                Ok::<_, Error>(())
            });
            assert!(outcome.is_err());
            session.add(country("de"))?;
            session.commit()?;
            assert_eq!(session.count(countries::table)?, 2);
            assert_eq!(session.find::<Country>("nl")?, kept);
            Ok(())
        })
    });
}

#[test]
fn rollback_leaves_no_row_in_memory_that_looks_stored() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            let bob = session.add(writer("Bob"))?;
            let eve = session.add(writer("Eve"))?;
            session.commit()?;
            let (id, eves) = (ada.read().id, eve.read().id);
            ada.write().name = "A".into();
            session.delete(&bob)?;
            let zoe = session.add(writer("Zoe"))?;
            let key = zoe.key();
            session.flush()?;
            assert_eq!((bob.state(), zoe.state(), key.id().is_some()), (RowState::Deleted, RowState::Persistent, true));
            eve.write().name = "E".into();
            let pending = session.add(writer("Max"))?;
            session.rollback()?;
            assert_eq!(
                [ada.state(), bob.state(), zoe.state(), eve.state(), pending.state()],
                [RowState::RolledBack, RowState::Expired, RowState::Discarded, RowState::Expired, RowState::Discarded]
            );
            assert_eq!((key.id(), zoe.key().id()), (None, None));
            assert_is!(ada.try_read(), Err(error) if error.kind() == ErrorKind::WrongState && error.row_state() == Some(RowState::RolledBack));
            assert_error!(ada.try_write(), WrongState);
            assert_eq!(eve.read().name, "Eve");
            assert!(!session.is_dirty());
            assert_eq!(session.find::<Writer>(id)?, ada);
            assert_eq!((ada.read().name.as_str(), ada.read().version), ("Ada", 1));
            session.delete(&bob)?;
            ada.write().name = "Augusta".into();
            session.commit()?;
            assert_eq!(writers(session)?, ["Augusta", "Eve"]);
            assert_eq!(session.get::<Writer>(eves)?, Some(eve));
            Ok(())
        })
    });
}

#[test]
fn savepoint_that_panics_undoes_its_own_changes() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            let bob = session.add(writer("Bob"))?;
            session.flush()?;
            ada.write().email = Some("before".into());
            let mut added = None;
            let message = panic_of(|| {
                session.savepoint(|session| -> Result<()> {
                    added = Some(session.add(writer("Eve"))?);
                    bob.write().name = "B".into();
                    session.savepoint(|session| {
                        session.delete(&bob)?;
                        session.flush()
                    })?;
                    panic!("on purpose")
                })
            });
            assert_eq!(message, "on purpose");
            let eve = added.expect("it ran");
            assert_eq!(
                (ada.state(), bob.state(), eve.state()),
                (RowState::Expired, RowState::RolledBack, RowState::Discarded)
            );
            session.refresh(&bob)?;
            assert_eq!((bob.read().name.as_str(), bob.read().version), ("Bob", 1));
            assert_eq!(ada.read().email.as_deref(), Some("before"));
            let kept = session.savepoint(|session| {
                bob.write().name = "B".into();
                session.add(writer("Zoe"))
            })?;
            assert_eq!((kept.state(), bob.read().version), (RowState::Persistent, 2));
            session.rollback()?;
            assert_eq!(
                (kept.state(), ada.state(), bob.state()),
                (RowState::Discarded, RowState::Discarded, RowState::Discarded)
            );
            Ok(())
        })
    });
}

#[test]
fn failed_transaction_and_removed_session_release_their_rows() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            session.commit()?;
            let mut inner = None;
            let outcome = session.transaction(|session| {
                inner = Some(session.add(writer("Bob"))?);
                session.flush()?;
                ada.write().name = "A".into();
                Err::<(), _>(Error::from(diesel::result::Error::NotFound))
            });
            assert!(outcome.is_err());
            assert_eq!((inner.expect("it ran").state(), ada.read().name.as_str()), (RowState::Discarded, "Ada"));
            let added = session.add(writer("Eve"))?;
            session.remove()?;
            assert_eq!((added.state(), ada.state()), (RowState::Discarded, RowState::Detached));
            assert!(!session.is_dirty());
            let again = session.find::<Writer>(ada.read().id)?;
            assert_ne!(again, ada);
            again.write().name = "A".into();
            session.commit()?;
            assert_eq!(writers(session)?, ["A"]);
            Ok(())
        })
    });
}

#[test]
fn retry_begins_with_nothing_unflushed() {
    blog(|shop| {
        inside(shop, |session| {
            session.add(writer("Ada"))?;
            assert_error!(session.retry(3, |_| Ok::<_, Error>(())), NotRepeatable);
            session.commit()?;
            let id = session.retry(3, |session| {
                let bob = session.add(writer("Bob"))?;
                session.flush()?;
                Ok::<_, Error>(bob.read().id)
            })?;
            assert_eq!(session.find::<Writer>(id)?.read().name, "Bob");
            Ok(())
        })
    });
}

#[test]
fn unflushed_rows_after_the_end_are_reported() {
    blog(|shop| {
        let session = shop.context(|| DB.session())?;
        let added = line!() + 1;
        assert_is!(session.add(writer("Ada")), Err(error) if error.kind() == ErrorKind::SessionEnded && error.location().expect("a location").line() == added);
        assert!(!session.is_dirty() && session.pending().is_empty());
        assert_error!(session.commit(), SessionEnded);
        assert_error!(session.get::<Writer>(1), SessionEnded);
        assert_error!(session.flush(), SessionEnded);
        let unflushed = shop.run(|| {
            let session = DB.session()?;
            session.add(writer("Ada"))?;
            session.add(writer("Ada"))?;
            Ok::<_, Error>(())
        });
        assert_eq!(unflushed.as_ref().err().and_then(kind_of), Some(&DatabaseErrorKind::UniqueViolation));
        shop.run(|| {
            DB.session()?.add(writer("Ada"))?;
            Ok::<_, Error>(())
        })?;
        inside(shop, |session| {
            assert_eq!(writers(session)?, ["Ada"]);
            Ok(())
        })
    });
}

fn country(code: &str) -> NewCountry {
    NewCountry {
        code: code.into(),
        name: "a country".into(),
        people: 0,
        area: 0.0,
        landlocked: false,
        flag: Vec::new(),
        founded: None,
    }
}

#[test]
fn write_guard_that_outlives_a_rollback_stores_nothing() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            session.commit()?;
            let mut guard = ada.write();
            guard.name = "w".into();
            session.rollback()?;
            guard.name = "ww".into();
            assert_error!(session.refresh(&ada), WriteInProgress);
            drop(guard);
            assert_eq!(ada.state(), RowState::RolledBack);
            session.refresh(&ada)?;
            assert_eq!(ada.read().name, "Ada");
            Ok(())
        })
    });
}

#[test]
fn row_deleted_by_raw_sql_returns_with_the_rollback() {
    blog(|shop| {
        inside(shop, |session| {
            let old = session.add(country("nl"))?;
            let other = session.add(country("be"))?;
            session.commit()?;
            session.execute(diesel::delete(countries::table))?;
            old.write().name = "written".into();
            let new = session.add(country("nl"))?;
            session.flush()?;
            assert_eq!((old.state(), new.state()), (RowState::Deleted, RowState::Persistent));
            assert_eq!((session.get::<Country>("be")?, other.state()), (None, RowState::Deleted));
            session.rollback()?;
            assert_eq!(
                (old.state(), new.state(), other.state()),
                (RowState::Expired, RowState::Discarded, RowState::Expired)
            );
            assert_eq!(session.get::<Country>("nl")?, Some(old));
            assert_eq!(session.get::<Country>("be")?, Some(other));
            Ok(())
        })
    });
}

/// What the world's own `posts` are: their foreign key is looked at by COMMIT.
#[derive(Debug, Clone, Queryable, Selectable, diesel_session::Entity)]
#[diesel(table_name = posts)]
#[entity(new = NewLatePost, connection = AnyConnection)]
pub struct LatePost {
    #[entity(generated)]
    pub id: i32,
    pub user_id: i32,
    pub title: String,
}

#[test]
fn refused_commit_leaves_no_row_in_memory() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            session.commit()?;
            ada.write().name = "A".into();
            let post = session.add(NewLatePost { user_id: 999, title: "without a user".into() })?;
            // MariaDB checks at once, after the UPDATE was sent.
            let (refused, left) = match KIND {
                Kind::Mariadb => (session.flush(), RowState::RolledBack),
                Kind::Postgres | Kind::Sqlite => {
                    session.flush()?;
                    assert_eq!(post.state(), RowState::Persistent);
                    (session.commit(), RowState::RolledBack)
                }
            };
            let error = refused.expect_err("there is no such user");
            assert_eq!(kind_of(&error), Some(&DatabaseErrorKind::ForeignKeyViolation));
            if KIND == Kind::Mariadb {
                session.rollback()?;
            }
            // A commit that is refused has rolled back: the session goes on.
            assert_eq!((post.state(), ada.state()), (RowState::Discarded, left));
            session.refresh(&ada)?;
            assert_eq!(ada.read().name, "Ada");
            session.commit()
        })
    });
}

#[test]
fn handle_that_outlives_its_session_says_so() {
    blog(|shop| {
        let (ada, bob, eve) = shop.context(|| {
            let session = DB.session()?;
            let (ada, bob) = (session.add(writer("Ada"))?, session.add(writer("Bob"))?);
            session.commit()?;
            let (ada, bob) = (session.find::<Writer>(ada.read().id)?, session.find::<Writer>(bob.read().id)?);
            ada.write().name = "A".into();
            let eve = session.add(writer("Eve"))?;
            session.flush()?;
            Ok::<_, Error>((ada, bob, eve))
        })?;
        assert_eq!(
            [ada.state(), bob.state(), eve.state()],
            [RowState::Detached, RowState::Detached, RowState::Discarded]
        );
        assert_eq!(bob.read().name, "Bob");
        let refused = ada.try_read().expect_err("its value is unknown");
        assert!(
            refused.kind() == ErrorKind::WrongState && refused.row_state() == Some(RowState::Detached),
            "{refused}"
        );
        for text in [refused.to_string(), ada.try_write().map(drop).unwrap_err().to_string()] {
            assert!(text.contains("session has ended") || text.contains("has ended"), "{text}");
            assert!(text.contains("present") && !text.contains("refresh"), "{text}");
        }
        inside(shop, |session| {
            assert_is!(session.refresh(&ada), Err(error) if error.kind() == ErrorKind::WrongState && error.row_state() == Some(RowState::Detached));
            assert_is!(session.delete(&ada), Err(error) if error.kind() == ErrorKind::WrongState && error.row_state() == Some(RowState::Detached));
            // The advice can be followed.
            let key = *ada.key().id().expect("it is known");
            assert_eq!(session.find::<Writer>(key)?.read().name, "Ada");
            Ok(())
        })
    });
}

#[test]
fn commit_with_rows_to_flush_after_the_deadline_sends_nothing() {
    blog(|shop| {
        let limit = Duration::from_millis(150);
        let late = shop.scope().deadline(limit).run_and_commit(|| {
            let session = DB.session()?;
            session.add(NewWriter { name: "Ada".into(), email: None })?;
            session.flush()?;
            session.add(NewWriter { name: "Bob".into(), email: None })?;
            // The time itself is what is tested.
            std::thread::sleep(limit);
            Ok::<_, Error>(())
        });
        assert_error!(&late, DeadlineExceeded);
        assert_eq!(shop.context(|| DB.session()?.count(writers::table))?, 0);
        Ok(())
    });
}

#[test]
fn unique_violation_is_told_from_other_errors() {
    blog(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let ada = || NewWriter { name: "Ada".into(), email: None };
            session.add(ada())?;
            session.commit()?;
            session.add(ada())?;
            let flushed = session.flush().unwrap_err();
            assert!(flushed.is_unique_violation(), "{flushed}");
            session.rollback()?;
            session.add(ada())?;
            let before_a_query = session.count(writers::table).unwrap_err();
            assert!(before_a_query.is_unique_violation(), "{before_a_query}");
            let afterwards = session.count(writers::table).unwrap_err();
            assert!(!afterwards.is_unique_violation(), "{afterwards}");
            session.rollback()?;
            let unknown = session.find::<Writer>(99).unwrap_err();
            assert!(!unknown.is_unique_violation(), "{unknown}");
            let wrong = session.execute(diesel::sql_query("SELEC 1")).unwrap_err();
            assert!(!wrong.is_unique_violation(), "{wrong}");
            session.rollback()
        })
    });
}

#[test]
fn get_or_create_in_a_read_committed_scope_finds_the_row_of_another_program() {
    blog(|shop| {
        shop.scope().isolation(Isolation::ReadCommitted).run(|| {
            let session = DB.session()?;
            let find = || session.track_first::<Writer>(writers::table.filter(writers::name.eq("Ada"))).optional();
            assert_is!(find(), Ok(None));
            elsewhere(shop, "INSERT INTO writers (name) VALUES ('Ada')");
            let created = session.savepoint(|session| {
                let ada = session.add(NewWriter { name: "Ada".into(), email: None })?;
                session.flush()?;
                Ok::<_, Error>(ada)
            });
            assert_eq!(created.as_ref().err().and_then(kind_of), Some(&DatabaseErrorKind::UniqueViolation));
            let found = find()?.expect("another program has added it");
            assert_eq!(found.read().name, "Ada");
            session.commit()
        })
    });
}
