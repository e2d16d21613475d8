//! What a flush sends, and in which order.

use std::collections::HashSet;

use diesel_session::Entity;

use diesel_session::unit_of_work::RowState;

use super::*;

#[test]
fn parents_come_first_and_go_last_in_whatever_order_of_the_calls() {
    blog(|shop| {
        for children_first in [false, true] {
            inside(shop, |session| {
                if children_first {
                    // The types are met in the other order.
                    session.get::<Label>((0, String::new()))?;
                    session.get::<Article>(0)?;
                }
                let ada = session.add(writer("Ada"))?;
                let hello = session.add(article(ada.key(), "Hello"))?;
                let label = session.add(NewLabel { article_id: hello.key(), name: "new", weight: 1 })?;
                session.flush()?;
                if children_first {
                    session.delete(&label)?;
                    session.delete(&hello)?;
                    session.delete(&ada)?;
                } else {
                    session.delete(&ada)?;
                    session.delete(&hello)?;
                    session.delete(&label)?;
                }
                session.commit()?;
                assert_eq!([ada.state(), hello.state(), label.state()], [RowState::Deleted; 3]);
                Ok(())
            })?;
        }
        inside(shop, |session| {
            assert_eq!((session.count(writers::table)?, session.count(labels::table)?), (0, 0));
            Ok(())
        })
    });
}

#[test]
fn rows_that_refer_to_their_own_kind_are_inserted_and_deleted_in_turns() {
    blog(|shop| {
        inside(shop, |session| {
            let mut chain = vec![session.add(node(None, "0"))?];
            for depth in 1..20 {
                let parent = chain[depth - 1].key();
                chain.push(session.add(node(Some(parent), &depth.to_string()))?);
            }
            let leaves: Vec<_> = (0..30)
                .map(|n| session.add(node(Some(chain[0].key()), &format!("leaf {n}"))))
                .collect::<Result<_>>()?;
            session.commit()?;
            assert_eq!(chain[19].read().parent_id, Some(chain[18].read().id));
            // The deletes of the parents are scheduled first, and the session knows that the children refer to them.
            session.preload::<Node>(chain.iter().chain(&leaves).map(|node| node.read().id))?;
            for node in chain.iter().chain(&leaves) {
                session.delete(node)?;
            }
            session.commit()?;
            assert_eq!(session.count(nodes::table)?, 0);
            Ok(())
        })
    });
}

#[test]
fn only_columns_that_differ_are_written() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            let hello = session.add(article(ada.key(), "Hello"))?;
            session.commit()?;
            elsewhere(shop, "UPDATE articles SET body = 'from elsewhere'");
            hello.write().title = "Good day".into();
            session.commit()?;
            session.refresh(&hello)?;
            assert_eq!((hello.read().title.as_str(), hello.read().body.as_str()), ("Good day", "from elsewhere"));
            // Written and the same as before: nothing is sent, so no version is counted.
            ada.update(|ada| ada.name = "Ada".into());
            assert!(!ada.is_dirty() && !session.is_dirty());
            session.commit()?;
            session.refresh(&ada)?;
            assert_eq!(ada.read().version, 1);
            ada.update(|ada| ada.email = Some("a@example.org".into()));
            session.commit()?;
            ada.update(|ada| ada.email = None);
            session.commit()?;
            session.refresh(&ada)?;
            assert_eq!((ada.read().email.clone(), ada.read().version), (None, 3));
            Ok(())
        })
    });
}

#[test]
fn first_of_two_writers_of_a_version_wins() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            session.commit()?;
            let other = shop.open_session()?;
            let theirs = other.find::<Writer>(ada.read().id)?;
            other.rollback()?;
            session.refresh(&ada)?;
            ada.write().name = "First".into();
            session.commit()?;
            theirs.write().name = "Second".into();
            let error = other.commit().expect_err("the version is another");
            assert!(error.is_stale() && error.to_string().contains(&format!("Writer {}", ada.read().id)), "{error}");
            let again = other.commit().expect_err("it wants a rollback");
            assert!(again.is_rollback_required() && again.to_string().contains("changed or deleted"), "{again}");
            other.rollback()?;
            assert_eq!(other.find::<Writer>(ada.read().id)?.read().name, "First");
            assert_eq!(theirs.read().name, "First");
            other.delete(&theirs)?;
            ada.write().name = "Third".into();
            other.rollback()?;
            session.commit()?;
            Ok(())
        })
    });
}

#[test]
fn update_of_a_missing_row_is_stale() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            let bob = session.add(writer("Bob"))?;
            let root = session.add(node(None, "root"))?;
            let leaf = session.add(node(None, "leaf"))?;
            session.commit()?;
            elsewhere(shop, "DELETE FROM writers");
            elsewhere(shop, "DELETE FROM nodes WHERE label = 'leaf'");
            ada.write().name = "A".into();
            assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::Stale && error.to_string().contains("so its update at "));
            session.rollback()?;
            session.delete(&bob)?;
            assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::Stale && error.to_string().contains("so its delete at "));
            session.rollback()?;
            session.delete(&root)?;
            session.delete(&leaf)?;
            assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::Stale && error.to_string().contains("so its delete at "));
            session.rollback()?;
            assert_eq!((root.state(), session.get::<Writer>(bob.read().id)?), (RowState::Expired, None));
            assert_eq!(bob.state(), RowState::Deleted);
            let gone = session.refresh(&leaf).expect_err("it is gone");
            assert!(gone.is_not_found() && gone.to_string().contains("Node"), "{gone}");
            assert_eq!((leaf.state(), leaf.read().label.as_str()), (RowState::Deleted, "leaf"));
            Ok(())
        })
    });
}

#[test]
fn a_unique_value_that_is_freed_can_be_taken_in_the_same_flush() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            let hello = session.add(article(ada.key(), "Hello"))?;
            let bob = session.add(writer("Bob"))?;
            session.commit()?;
            // By a new row; the children of the old one go with it.
            session.delete(&hello)?;
            session.delete(&ada)?;
            let second = session.add(writer("Ada"))?;
            session.commit()?;
            assert_eq!((hello.state(), second.read().version), (RowState::Deleted, 1));
            // By one that is updated.
            session.delete(&second)?;
            bob.write().name = "Ada".into();
            session.commit()?;
            assert_eq!(writers(session)?, ["Ada"]);
            // What is to be moved away from a row is moved before that row goes.
            let moved = session.add(article(bob.key(), "Moved"))?;
            session.flush()?;
            let eve = session.add(writer("Eve"))?;
            session.flush()?;
            moved.write().writer_id = eve.read().id;
            session.delete(&bob)?;
            session.add(writer("Zoe"))?;
            session.commit()?;
            assert_eq!(writers(session)?, ["Eve", "Zoe"]);
            Ok(())
        })
    });
}

#[test]
fn children_deleted_by_the_database_leave_the_session() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            let hello = session.add(article(ada.key(), "Hello"))?;
            let label = session.add(NewLabel { article_id: hello.key(), name: "new", weight: 1 })?;
            session.flush()?;
            let key = (hello.read().id, "new".to_owned());
            assert_eq!(session.get::<Label>(key.clone())?, Some(label.clone()));
            session.delete(&hello)?;
            session.flush()?;
            assert_eq!(session.get::<Label>(key)?, None);
            assert_eq!((label.state(), ada.state()), (RowState::Deleted, RowState::Persistent));
            Ok(())
        })
    });
}

#[test]
fn queries_flush_first_unless_they_are_told_not_to() {
    blog(|shop| {
        inside(shop, |session| {
            session.no_autoflush(|session| {
                session.add(writer("Ada"))?;
                assert_eq!(writers(session)?, Vec::<String>::new());
                assert_eq!((session.pending().len(), session.dirty().len(), session.deleted().len()), (1, 0, 0));
                Ok::<_, Error>(())
            })?;
            assert_eq!(writers(session)?, ["Ada"]);
            assert!(!session.is_dirty());
            let ada = session.track_first::<Writer>(writers::table)?;
            ada.write().name = "A".into();
            assert_eq!(
                session.dirty().of::<Writer>().map(|(_, writer)| writer.clone()).collect::<Vec<_>>(),
                vec![ada.clone()]
            );
            assert!(session.exists(writers::table.filter(writers::name.eq("A")))?);
            session.delete(&ada)?;
            assert_eq!(session.deleted().len(), 1);
            assert_eq!(session.get::<Writer>(ada.read().id)?, None);
            session.add(writer("Eve"))?;
            let seen: i64 = session.with(|conn| writers::table.count().get_result(conn))?;
            assert_eq!(seen, 1);
            session.add(writer("Zoe"))?;
            assert_eq!(session.count(writers::table)?, 2);
            Ok(())
        })
    });
}

#[test]
fn an_autocommit_scope_commits_each_flush() {
    blog(|shop| {
        shop.scope().autocommit().run(|| {
            let session = DB.session()?;
            let ada = session.add(writer("Ada"))?;
            session.add(article(ada.key(), "Hello"))?;
            session.flush()?;
            assert!(!session.in_transaction());
            session.add(writer("Ada"))?;
            session.add(writer("Bob"))?;
            // All of it or nothing, and the session goes on.
            assert!(session.flush().is_err());
            assert_eq!(writers(&session)?, ["Ada"]);
            ada.write().name = "A".into();
            session.commit()
        })?;
        shop.scope().read_only().run(|| {
            let session = DB.session()?;
            assert_eq!(writers(&session)?, ["A"]);
            session.add(writer("Bob"))?;
            assert!(session.flush().is_err());
            session.rollback()
        })
    });
}

#[test]
fn rows_beyond_one_statement_are_sent_in_several() {
    blog(|shop| {
        inside(shop, |session| {
            let many = if cfg!(debug_assertions) { 2_500 } else { 25_000 };
            let added: Vec<_> = (0..many).map(|n| session.add(writer(&format!("w{n}")))).collect::<Result<_>>()?;
            session.flush()?;
            assert_pairs(&added, |n, writer: &Writer| writer.name == format!("w{n}"));
            let ids: Vec<i32> = added.iter().map(|writer| writer.read().id).collect();
            session.expire_all();
            session.preload::<Writer>(ids)?;
            assert!(added.iter().all(|writer| writer.state() == RowState::Persistent));
            added.iter().try_for_each(|writer| session.delete(writer))?;
            let ada = session.add(writer("Ada"))?;
            session.commit()?;
            assert_eq!((writers(session)?, ada.state()), (vec!["Ada".to_owned()], RowState::Expired));
            Ok(())
        })
    });
}

#[track_caller]
fn assert_pairs<T: Entity<Id: Ord>>(added: &[diesel_session::Tracked<T>], is: impl Fn(usize, &T) -> bool) {
    for (n, handle) in added.iter().enumerate() {
        assert!(is(n, &handle.read()), "{n}: {handle:?}");
    }
    let keys: HashSet<_> = added.iter().map(|handle| handle.read().id()).collect();
    assert_eq!(keys.len(), added.len());
}

#[test]
fn rows_of_several_threads_get_their_own_keys() {
    blog(|shop| {
        // Row by row through an enum of connections.
        let by_enum = std::any::type_name::<Conn>() == std::any::type_name::<AnyConnection>();
        let (batches, rows) = if by_enum { (4, 50) } else { (40, 500) };
        crate::fixtures::threads::together(4, |thread| {
            for batch in 0..batches {
                let outcome = inside(shop, |session| {
                    let added: Vec<_> = (0..rows)
                        .map(|row| session.add(node(None, &format!("{thread} {batch} {row}"))))
                        .collect::<Result<_>>()?;
                    session.commit()?;
                    let ids: Vec<i64> = added.iter().map(|node| node.read().id).collect();
                    let labels: Vec<(i64, String)> =
                        session.load(nodes::table.filter(nodes::id.eq_any(ids)).select((nodes::id, nodes::label)))?;
                    let labels: std::collections::HashMap<_, _> = labels.into_iter().collect();
                    for (row, node) in added.iter().enumerate() {
                        assert_eq!(labels[&node.read().id], format!("{thread} {batch} {row}"));
                        assert_eq!(node.read().label, labels[&node.read().id]);
                    }
                    Ok(())
                });
                outcome.unwrap_or_else(|error| panic!("{error}"));
            }
        });
        inside(shop, |session| {
            assert_eq!(session.count(nodes::table)?, 4 * batches * rows);
            Ok(())
        })
    });
}

#[test]
fn descending_sequence_matches_rows_and_keys() {
    blog(|shop| {
        match KIND {
            Kind::Postgres => elsewhere(
                shop,
                "ALTER SEQUENCE nodes_id_seq INCREMENT BY -3 MINVALUE -100000 MAXVALUE 1000 START WITH 1000 RESTART",
            ),
            // Elsewhere nothing descends; keys with gaps are as near as one gets.
            Kind::Mariadb => elsewhere(shop, "INSERT INTO nodes (id, label) VALUES (500, 'x'); DELETE FROM nodes"),
            Kind::Sqlite => elsewhere(shop, "INSERT INTO nodes (id, label) VALUES (500, 'x'); DELETE FROM nodes"),
        }
        inside(shop, |session| {
            let added: Vec<_> = (0..700).map(|n| session.add(node(None, &n.to_string()))).collect::<Result<_>>()?;
            session.flush()?;
            assert_pairs(&added, |n, node: &Node| node.label == n.to_string());
            if KIND == Kind::Postgres {
                assert!(added[0].read().id > added[699].read().id);
            }
            let stored: Vec<(i64, String)> = session
                .load(nodes::table)?
                .into_iter()
                .map(|(id, _, label): (i64, Option<i64>, String)| (id, label))
                .collect();
            for (id, label) in stored {
                assert_eq!(session.find::<Node>(id)?.read().label, label);
            }
            Ok(())
        })
    });
}

diesel::table! {
    tokens (code) {
        code -> Text,
        owner -> Text,
    }
}

/// A key that the database makes and does not count.
#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = tokens, primary_key(code))]
#[entity(new = NewToken, connection = AnyConnection)]
pub struct Token {
    #[entity(generated)]
    pub code: String,
    pub owner: String,
}

#[test]
fn keys_without_a_sequence_are_read_row_by_row() {
    blog(|shop| {
        let code = match KIND {
            Kind::Postgres => "TEXT DEFAULT gen_random_uuid()::text",
            Kind::Mariadb => "VARCHAR(100) DEFAULT (uuid())",
            Kind::Sqlite => "TEXT DEFAULT (lower(hex(randomblob(16))))",
        };
        elsewhere(shop, &format!("CREATE TABLE tokens (code {code} PRIMARY KEY, owner VARCHAR(100) NOT NULL)"));
        inside(shop, |session| {
            let added: Vec<_> =
                (0..50).map(|n| session.add(NewToken { owner: n.to_string() })).collect::<Result<_>>()?;
            if KIND == Kind::Mariadb {
                let error = session.flush().expect_err("MariaDB does not tell");
                assert!(format!("{error:#}").contains("make other keys in the program"), "{error:#}");
                return session.rollback();
            }
            session.flush()?;
            assert_pairs(&added, |n, token: &Token| token.owner == n.to_string());
            Ok(())
        })
    });
}
