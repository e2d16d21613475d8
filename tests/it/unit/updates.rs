//! Many rows that differ at once.

use diesel_session::Tracked;

use super::*;

/// Whether several rows go in one statement.
fn together() -> bool {
    std::any::TypeId::of::<Conn>() == std::any::TypeId::of::<diesel::PgConnection>()
}

/// Writers of these many, committed.
fn crowd(shop: &Shop<Conn>, rows: usize) -> Result<()> {
    inside(shop, |session| {
        for row in 0..rows {
            session.add(NewWriter { name: format!("w{row}"), email: Some(format!("w{row}@example.org")) })?;
        }
        session.commit()
    })
}

fn tracked(session: &Session<Conn>) -> Result<Vec<Tracked<Writer>>> {
    session.track::<Writer>(writers::table.order(writers::id))
}

/// What the database has, without keys.
fn stored(shop: &Shop<Conn>) -> Result<Vec<(String, Option<String>, i32)>> {
    shop.context(|| {
        let columns = (writers::name, writers::email, writers::version);
        DB.session()?.load(writers::table.order(writers::id).select(columns))
    })
}

/// Makes PostgreSQL count the UPDATEs of writers.
fn count_updates(shop: &Shop<Conn>) {
    if KIND == Kind::Postgres {
        elsewhere(
            shop,
            "CREATE TABLE updates (one INTEGER);
             CREATE FUNCTION note_update() RETURNS trigger AS $$ BEGIN INSERT INTO updates VALUES (1); RETURN NULL; END $$ LANGUAGE plpgsql;
             CREATE TRIGGER noted AFTER UPDATE ON writers FOR EACH STATEMENT EXECUTE FUNCTION note_update()",
        );
    }
}

diesel::table! { updates (one) { one -> Integer, } }

fn assert_updates(session: &Session<Conn>, wanted: (i64, i64)) -> Result<()> {
    if KIND == Kind::Postgres {
        assert_eq!(session.count(updates::table)?, if together() { wanted.0 } else { wanted.1 });
    }
    Ok(())
}

#[test]
fn updates_of_one_column_are_sent_in_few_statements() {
    blog(|shop| {
        crowd(shop, 1200)?;
        count_updates(shop);
        inside(shop, |session| {
            let all = tracked(session)?;
            all.iter().for_each(|row| row.update(|row| row.name.insert(0, 'x')));
            session.flush()?;
            assert_updates(session, (3, 1200))?;
            assert!(all.iter().all(|row| row.read().version == 2 && !row.is_dirty()));
            session.commit()
        })?;
        let stored = stored(shop)?;
        assert_eq!(stored.len(), 1200);
        for (at, row) in stored.into_iter().enumerate() {
            assert_eq!(row, (format!("xw{at}"), Some(format!("w{at}@example.org")), 2));
        }
        Ok(())
    });
}

#[test]
fn updates_of_different_columns_are_sent_by_column_set() {
    blog(|shop| {
        crowd(shop, 90)?;
        count_updates(shop);
        inside(shop, |session| {
            let all = tracked(session)?;
            for (at, row) in all.iter().enumerate() {
                row.update(|row| {
                    if at % 9 < 6 {
                        row.name.insert(0, 'x');
                    }
                    if at % 9 >= 3 {
                        row.email = None;
                    }
                });
            }
            session.flush()?;
            assert_updates(session, (30, 90))?;
            // And again what the database has by now.
            all.iter().for_each(|row| row.update(|row| row.email = Some("@".into())));
            session.flush()?;
            assert_updates(session, (31, 180))?;
            assert!(all.iter().all(|row| row.read().version == 3));
            all.iter().for_each(|row| row.update(|row| row.email = (row.id % 2 == 0).then(String::new)));
            all.iter().filter(|row| row.read().id % 9 >= 3).for_each(|row| row.update(|row| row.email = None));
            session.commit()?;
            for row in &all {
                let wanted = (row.read().id % 2 == 0 && row.read().id % 9 < 3).then(String::new);
                assert_eq!(row.read().email, wanted);
            }
            Ok(())
        })?;
        for (at, (name, _, version)) in stored(shop)?.into_iter().enumerate() {
            let x = if at % 9 < 6 { "x" } else { "" };
            assert_eq!((name, version), (format!("{x}w{at}"), 4));
        }
        Ok(())
    });
}

#[test]
fn stale_row_among_many_updates_is_named_and_nothing_is_kept() {
    blog(|shop| {
        crowd(shop, 1000)?;
        let before = stored(shop)?;
        // On SQLite no other connection writes meanwhile. There a trigger makes the row look deleted.
        let stale = match KIND {
            Kind::Sqlite => {
                "CREATE TRIGGER gone BEFORE UPDATE ON writers WHEN OLD.name = 'w700' BEGIN SELECT RAISE(IGNORE); END"
            }
            _ => "UPDATE writers SET version = 7 WHERE name = 'w700'",
        };
        if KIND == Kind::Sqlite {
            elsewhere(shop, stale);
        }
        inside(shop, |session| {
            let all = tracked(session)?;
            if KIND != Kind::Sqlite {
                elsewhere(shop, stale);
            }
            all.iter().for_each(|row| row.update(|row| row.name.insert(0, 'x')));
            let id = all[700].read().id.to_string();
            match session.flush().expect_err("one is stale") {
                error if error.kind() == ErrorKind::Stale => {
                    assert_eq!((error.entity(), error.key()), (Some("Writer"), Some(&*id)));
                }
                // With its default isolation MariaDB may refuse the row by itself.
                other if KIND == Kind::Mariadb => assert!(other.to_string().contains("changed since"), "{other}"),
                other => panic!("{other:?}"),
            }
            session.rollback()?;
            assert!(all.iter().all(|row| !row.is_dirty()));
            Ok(())
        })?;
        for (at, (now, then)) in stored(shop)?.into_iter().zip(before).enumerate() {
            let version = if at == 700 && KIND != Kind::Sqlite { 7 } else { 1 };
            assert_eq!((&now.0, &now.1, now.2), (&then.0, &then.1, version));
        }
        Ok(())
    });
}

#[test]
fn updates_of_rows_with_composite_keys_are_stored() {
    blog(|shop| {
        inside(shop, |session| {
            let ada = session.add(writer("Ada"))?;
            for title in ["one", "two"] {
                let article = session.add(article(ada.key(), title))?;
                for (weight, name) in (0..).zip(["a", "b", "c"]) {
                    session.add(NewLabel { article_id: article.key(), name, weight })?;
                }
            }
            session.commit()
        })?;
        let query = || labels::table.order((labels::article_id, labels::name));
        inside(shop, |session| {
            let all = session.track::<Label>(query())?;
            // All but one.
            for (at, row) in all.iter().enumerate().filter(|(at, _)| *at != 4) {
                row.update(|row| row.weight += 10 * (1 + at as i32));
            }
            session.commit()
        })?;
        inside(shop, |session| {
            let weights: Vec<i32> = session.load(query().select(labels::weight))?;
            assert_eq!(weights, [10, 21, 32, 40, 1, 62]);
            Ok(())
        })
    });
}

#[test]
fn updates_of_columns_of_many_types_are_stored() {
    blog(|shop| {
        let moment = |second| chrono::DateTime::from_timestamp(second, 0).map(|moment| moment.naive_utc());
        inside(shop, |session| {
            for n in 0..5_i64 {
                session.add(NewCountry {
                    code: format!("c{n}"),
                    name: String::new(),
                    people: n,
                    area: 0.0,
                    landlocked: false,
                    flag: Vec::new(),
                    founded: moment(n),
                })?;
            }
            session.commit()
        })?;
        let query = || countries::table.order(countries::code);
        let wanted = |n: i64, founded| Country {
            code: format!("c{n}"),
            name: format!("'{n}' \u{e9} \\"),
            people: i64::MAX - n,
            area: 0.1 + n as f64,
            landlocked: true,
            flag: vec![0, 255, n as u8],
            founded,
        };
        // Nowhere known; known here and there; known everywhere.
        for known in [(|_| false) as fn(i64) -> bool, |n| n % 2 == 0, |_| true] {
            inside(shop, |session| {
                for (n, row) in (0..).zip(session.track::<Country>(query())?) {
                    row.update(|row| *row = wanted(n, moment(1_000_000 + n).filter(|_| known(n))));
                }
                session.commit()
            })?;
            inside(shop, |session| {
                let now: Vec<Country> =
                    session.track::<Country>(query())?.iter().map(|row| row.read().clone()).collect();
                let wanted: Vec<_> = (0..5).map(|n| wanted(n, moment(1_000_000 + n).filter(|_| known(n)))).collect();
                assert_eq!(now, wanted);
                Ok(())
            })?;
        }
        Ok(())
    });
}
