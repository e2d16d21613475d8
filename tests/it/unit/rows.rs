//! The identity map.

use diesel_session::unit_of_work::RowState;

use super::*;

#[test]
fn a_graph_of_new_rows_is_one_commit() {
    blog(|shop| {
        let id = inside_id(shop)?;
        inside(shop, |session| {
            let ada = session.find::<Writer>(id)?;
            assert_eq!((ada.read().name.as_str(), ada.read().version), ("Ada", 1));
            assert_eq!(titles(session)?, ["Hello", "Again"]);
            ada.write().name = "Augusta".into();
            session.commit()?;
            assert_eq!((ada.read().name.as_str(), ada.read().version), ("Augusta", 2));
            assert_eq!(writers(session)?, ["Augusta"]);
            Ok(())
        })
    });

    fn inside_id(shop: &Shop<Conn>) -> Result<i32> {
        shop.context(|| {
            let session = DB.session()?;
            let ada = session.add(writer("Ada"))?;
            assert_eq!(ada.state(), RowState::Pending);
            session.add(article(ada.key(), "Hello"))?;
            session.add(article(&ada, "Again"))?;
            session.commit()?;
            Ok(ada.read().id)
        })
    }
}

#[test]
fn one_row_is_one_handle_however_it_is_read() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            let hello = session.add(article(ada.key(), "Hello"))?;
            session.flush()?;
            let id = ada.read().id;
            assert_eq!(session.get::<Writer>(id)?, Some(ada.clone()));
            assert_eq!(session.track::<Writer>(writers::table)?, vec![ada.clone()]);
            let query = articles::table.inner_join(writers::table);
            let pairs =
                session.track::<(Article, Writer)>(query.select((articles::all_columns, writers::all_columns)))?;
            assert_eq!(pairs, [(hello.clone(), ada.clone())]);
            let query = writers::table.left_join(articles::table).select((
                writers::name,
                Option::<Article>::as_select(),
                writers::email,
            ));
            let rows = session.track::<(String, Option<Article>, Option<String>)>(query)?;
            assert_eq!(rows, [("Ada".to_owned(), Some(hello), None)]);
            assert_eq!(session.track_first::<Writer>(writers::table.filter(writers::name.eq("Ada")))?, ada);
            assert_error!(session.track_first::<Writer>(writers::table.filter(writers::name.eq("Bob"))), NotFound);
            Ok(())
        })
    });
}

#[test]
fn identity_map_wins_until_a_row_expires() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            session.commit()?;
            let id = ada.read().id;
            assert_eq!(ada.state(), RowState::Expired);
            elsewhere(shop, "UPDATE writers SET email = 'a@example.org'");
            // It can be read, and is what was known.
            assert_eq!(ada.read().email, None);
            assert_eq!(session.find::<Writer>(id)?.read().email.as_deref(), Some("a@example.org"));
            assert_eq!((ada.state(), ada.read().email.as_deref()), (RowState::Persistent, Some("a@example.org")));
            if KIND == Kind::Sqlite {
                // No other connection is blocked: nothing has been written in this transaction.
                elsewhere(shop, "UPDATE writers SET email = 'b@example.org'");
                session.track::<Writer>(writers::table)?;
                assert_eq!(ada.read().email.as_deref(), Some("a@example.org"));
                session.refresh(&ada)?;
                assert_eq!(ada.read().email.as_deref(), Some("b@example.org"));
            }
            session.expire(&ada)?;
            assert_eq!(ada.state(), RowState::Expired);
            session.get::<Writer>(id)?;
            assert_eq!(ada.state(), RowState::Persistent);
            session.execute(diesel::update(writers::table).set(writers::email.eq("c@example.org")))?;
            assert_eq!(ada.state(), RowState::Expired);
            assert_eq!(session.find::<Writer>(id)?.read().email.as_deref(), Some("c@example.org"));
            session
                .with(|conn| diesel::update(writers::table).set(writers::email.eq("d@example.org")).execute(conn))?;
            assert_eq!(session.find::<Writer>(id)?.read().email.as_deref(), Some("d@example.org"));
            drop(session.connection()?);
            assert_eq!(ada.state(), RowState::Expired);
            Ok(())
        })
    });
}

#[test]
fn missing_row_is_none_for_get_and_named_by_find() {
    blog(|shop| {
        inside(shop, |session| {
            assert_eq!(session.get::<Writer>(7)?, None);
            let error = session.find::<Writer>(7).expect_err("there is none");
            assert!(error.is_not_found() && error.to_string().contains("no Writer 7"), "{error}");
            let error = session.find::<Label>((7, "x".to_owned())).expect_err("there is none");
            assert!(error.to_string().contains("Label (7, \"x\")") && error.to_string().contains("rows.rs"), "{error}");
            Ok(())
        })
    });
}

#[test]
fn get_many_sends_one_query() {
    blog(|shop| {
        inside(shop, |session| {
            let ids: Vec<i32> = {
                let added: Vec<_> = (0..5).map(|n| session.add(writer(&format!("w{n}")))).collect::<Result<_>>()?;
                session.commit()?;
                added.iter().map(|writer| writer.read().id).collect()
            };
            let found = session.get_many::<Writer>([ids[3], 9999, ids[0], ids[3]])?;
            let names: Vec<_> =
                found.iter().map(|found| found.as_ref().map(|writer| writer.read().name.clone())).collect();
            assert_eq!(names, [Some("w3".into()), None, Some("w0".into()), Some("w3".into())]);
            session.preload::<Writer>(ids.iter().copied())?;
            elsewhere_is_not_asked(session, &ids)
        })
    });

    /// After a preload nothing is sent.
    fn elsewhere_is_not_asked(session: &Session<Conn>, ids: &[i32]) -> Result<()> {
        for &id in ids {
            assert_eq!(session.find::<Writer>(id)?.state(), RowState::Persistent);
        }
        Ok(())
    }
}

#[test]
fn entities_of_every_shape_are_stored_and_read() {
    blog(|shop| {
        let founded = chrono::DateTime::from_timestamp(1_000_000, 0).map(|moment| moment.naive_utc());
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            let bob = session.add(writer("Bob"))?;
            let mut hello = article(ada.key(), "Hello");
            hello.editor_id = Some(bob.key());
            let hello = session.add(hello)?;
            session.add(NewLabel { article_id: hello.key(), name: "new", weight: 1 })?;
            session.add(NewLabel { article_id: hello.key(), name: "old", weight: 2 })?;
            session.add(NewFollow { follower_id: ada.key(), followed_id: bob.key() })?;
            let root = session.add(node(None, "root"))?;
            let child = session.add(node(Some(root.key()), "child"))?;
            session.add(node(Some(child.key()), "grandchild"))?;
            session.add(NewCountry {
                code: "nl".into(),
                name: "Nederland".into(),
                people: 17_000_000_000,
                area: 41_850.5,
                landlocked: false,
                flag: vec![0, 255, 7],
                founded,
            })?;
            session.commit()
        })?;
        inside(shop, |session| {
            let hello = session.track_first::<Article>(articles::table)?;
            let bob = session.track_first::<Writer>(writers::table.filter(writers::name.eq("Bob")))?;
            assert_eq!(hello.read().editor_id, Some(bob.read().id));
            let id = hello.read().id;
            let many =
                session.get_many::<Label>([(id, "old".to_owned()), (id, "none".to_owned()), (id, "new".to_owned())])?;
            let weights: Vec<_> = many.iter().map(|label| label.as_ref().map(|label| label.read().weight)).collect();
            assert_eq!(weights, [Some(2), None, Some(1)]);
            let label = session.find::<Label>((id, "new".to_owned()))?;
            label.update(|label| label.weight += 10);
            let country = session.find::<Country>("nl")?;
            assert_eq!((country.read().founded, country.read().flag.clone()), (founded, vec![0, 255, 7]));
            country.update(|country| {
                country.founded = None;
                country.area = 0.5;
                country.landlocked = true;
            });
            let nodes: Vec<_> = session.track::<Node>(nodes::table.order(nodes::id))?;
            assert_eq!(nodes[2].read().parent_id, Some(nodes[1].read().id));
            session.commit()
        })?;
        inside(shop, |session| {
            let country = session.find::<Country>("nl")?.read().clone();
            assert_eq!(
                (country.founded, country.area, country.landlocked, country.people),
                (None, 0.5, true, 17_000_000_000)
            );
            let name = session.find::<CountryName>("nl")?;
            name.write().name = "Holland".into();
            session.flush()?;
            session.refresh(&session.find::<Country>("nl")?)?;
            assert_eq!(session.find::<Country>("nl")?.read().name, "Holland");
            let labels: Vec<i32> = session.load(labels::table.order(labels::name).select(labels::weight))?;
            assert_eq!(labels, [11, 2]);
            let follow = session.track_first::<Follow>(follows::table)?;
            session.delete(&follow)?;
            session.flush()?;
            assert_eq!((follow.state(), session.count(follows::table)?), (RowState::Deleted, 0));
            Ok(())
        })
    });
}

#[test]
fn snapshot_keeps_its_values_and_a_write_guard_is_exclusive() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            assert_is!(ada.try_read(), Err(error) if error.kind() == ErrorKind::WrongState && error.row_state() == Some(RowState::Pending));
            assert!(panic_of(|| ada.read()).contains("not inserted yet"));
            assert_error!(ada.try_write(), WrongState);
            session.flush()?;
            let before = ada.read();
            ada.write().name = "Augusta".into();
            assert_eq!((before.name.as_str(), ada.read().name.as_str()), ("Ada", "Augusta"));
            assert!(ada.is_dirty() && session.is_dirty());
            let guard = ada.write();
            let error = ada.try_read().expect_err("it is being written");
            assert!(error.to_string().contains("rows.rs"), "{error}");
            // Found before anything is sent: the session goes on.
            assert_error!(session.flush(), WriteInProgress);
            let query = session.load::<String>(writers::table.select(writers::name));
            assert_error!(&query, Autoflush);
            drop(guard);
            assert_eq!(writers(session)?, ["Augusta"]);
            ada.write().id += 1;
            let error = session.flush().expect_err("the key was written");
            assert!(error.kind() == ErrorKind::KeyChanged, "{error}");
            ada.write().id -= 1;
            session.commit()
        })
    });
}

#[test]
fn handles_outlive_their_session_as_values() {
    blog(|shop| {
        let (kept, added, written) = shop.context(|| {
            let session = DB.session()?;
            let kept = session.add(writer("Ada"))?;
            session.commit()?;
            let written = session.add(writer("Bob"))?;
            session.flush()?;
            let added = session.add(writer("Eve"))?;
            Ok::<_, Error>((kept, added, written))
        })?;
        assert_eq!((kept.state(), kept.read().name.as_str()), (RowState::Detached, "Ada"));
        assert_is!(kept.try_write(), Err(error) if error.kind() == ErrorKind::WrongState && error.row_state() == Some(RowState::Detached));
        assert_eq!((added.state(), written.state()), (RowState::Discarded, RowState::Discarded));
        assert_error!(written.try_read(), WrongState);
        inside(shop, |session| {
            assert_error!(session.delete(&kept), WrongState);
            assert_error!(session.refresh(&kept), WrongState);
            let other = shop.open_session()?;
            let there = other.find::<Writer>(kept.read().id)?;
            assert_error!(session.delete(&there), ForeignHandle);
            // A row that was never inserted has no key for others.
            session.add(article(written.key(), "x"))?;
            assert_error!(session.flush(), UnresolvedKeys);
            session.rollback()
        })
    });
}

#[test]
fn expunged_rows_are_released() {
    blog(|shop| {
        inside(shop, |session| {
            let (ada, bob, eve) =
                (session.add(writer("Ada"))?, session.add(writer("Bob"))?, session.add(writer("Eve"))?);
            session.expunge(&eve)?;
            session.flush()?;
            assert_eq!((eve.state(), writers(session)?.len()), (RowState::Discarded, 2));
            ada.write().name = "A".into();
            session.expunge(&ada)?;
            assert_eq!(ada.state(), RowState::Detached);
            assert!(!session.is_dirty());
            assert_ne!(session.find::<Writer>(ada.read().id)?, ada);
            bob.write().name = "B".into();
            session.expunge_all();
            assert_eq!(bob.state(), RowState::Detached);
            session.commit()?;
            assert_eq!(writers(session)?, ["Ada", "Bob"]);
            Ok(())
        })
    });
}

#[test]
fn expire_all_forgets_what_was_written() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            session.flush()?;
            ada.write().name = "A".into();
            session.add(writer("Bob"))?;
            session.expire_all();
            assert_eq!((ada.state(), ada.read().name.as_str()), (RowState::Expired, "Ada"));
            assert!(session.is_dirty());
            assert_eq!(writers(session)?, ["Ada", "Bob"]);
            assert!(!session.is_dirty());
            Ok(())
        })
    });
}

#[test]
fn rows_without_handles_are_dropped_at_commit() {
    blog(|shop| {
        inside(shop, |session| {
            for round in 0..3 {
                let held: Vec<_> =
                    (0..1500).map(|n| session.add(writer(&format!("{round} {n}")))).collect::<Result<_>>()?;
                session.commit()?;
                assert_eq!(held[7].read().name, format!("{round} 7"));
            }
            assert_eq!(session.count(writers::table)?, 4500);
            Ok(())
        })
    });
}

#[test]
fn a_query_that_says_what_its_rows_are_needs_no_more() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            session.add(article(&ada, "Hello"))?;
            session.flush()?;
            let written = session.track(Article::belonging_to(&*ada.read()).select(Article::as_select()))?;
            assert_eq!(written[0].read().title, "Hello");
            let first = session.track_first(articles::table.select(Article::as_select()).order(articles::id))?;
            assert_eq!(first, written[0]);
            let pairs =
                session.track(articles::table.inner_join(writers::table).select(<(Article, Writer)>::as_select()))?;
            assert!(pairs.iter().all(|(_, writer)| *writer == ada));
            let names = session.track::<String>(writers::table.select(writers::name))?;
            assert_eq!(names, ["Ada"]);
            let by_key = session.track(writers::table.filter(writers::id.eq(ada.key())).select(Writer::as_select()))?;
            assert_eq!(by_key, [ada]);
            Ok(())
        })
    });
}

#[test]
fn track_gives_plain_values_of_any_type_beside_entities() {
    use diesel_session::unit_of_work::Plain;
    blog(|shop| {
        inside(shop, |session| {
            let founded = chrono::DateTime::from_timestamp(7, 0).map(|moment| moment.naive_utc());
            session.add(NewCountry {
                code: "x".into(),
                name: "X".into(),
                people: 1,
                area: 0.5,
                landlocked: false,
                flag: vec![1],
                founded,
            })?;
            type Row = (Country, Plain<Option<chrono::NaiveDateTime>>, i64);
            let query = countries::table.select((countries::all_columns, countries::founded, countries::people));
            let (country, moment, people) = session.track_first::<Row>(query)?;
            assert_eq!((country.read().founded, moment, people), (founded, founded, 1));
            Ok(())
        })
    });
}
