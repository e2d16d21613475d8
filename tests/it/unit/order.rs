//! The order of the statements of a flush.

use diesel_session::Entity;

use diesel_session::unit_of_work::RowState;

use super::*;

diesel::table! { lists (id) { id -> Integer, name -> Text, rank -> Nullable<Integer>, } }
diesel::table! { items (id) { id -> Integer, list_id -> Integer, position -> Integer, } }
diesel::table! { pairs (id) { id -> Integer, other_id -> Nullable<Integer>, version -> Integer, } }
diesel::table! { tight (id) { id -> Integer, other_id -> Integer, } }
diesel::table! { regions (code) { code -> Text, parent_code -> Nullable<Text>, } }
diesel::table! { cities (code) { code -> Text, region_code -> Nullable<Text>, } }
diesel::table! { mayors (code) { code -> Text, city_code -> Nullable<Text>, } }
diesel::table! { persons (id) { id -> Integer, favourite_id -> Nullable<Integer>, } }
diesel::table! { songs (id) { id -> Integer, singer_id -> Integer, } }

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(new = NewList, connection = AnyConnection)]
pub struct List {
    #[entity(generated)]
    pub id: i32,
    pub name: String,
    pub rank: Option<i32>,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(new = NewItem, connection = AnyConnection)]
pub struct Item {
    pub id: i32,
    #[entity(references = List)]
    pub list_id: i32,
    pub position: i32,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(new = NewPair, connection = AnyConnection)]
pub struct Pair {
    pub id: i32,
    #[entity(references = Pair)]
    pub other_id: Option<i32>,
    #[entity(version)]
    pub version: i32,
}

/// The same without a version, so that its DELETEs go together.
#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = pairs)]
#[entity(connection = AnyConnection)]
pub struct PlainPair {
    pub id: i32,
    #[entity(references = PlainPair)]
    pub other_id: Option<i32>,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = tight)]
#[entity(connection = AnyConnection)]
pub struct Tight {
    pub id: i32,
    #[entity(references = Tight)]
    pub other_id: i32,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(connection = AnyConnection)]
pub struct Person {
    pub id: i32,
    #[entity(references = Song)]
    pub favourite_id: Option<i32>,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(connection = AnyConnection)]
pub struct Song {
    pub id: i32,
    #[entity(references = Person)]
    pub singer_id: i32,
}

fn tables() -> String {
    let counted = match KIND {
        Kind::Sqlite => "INTEGER PRIMARY KEY",
        Kind::Postgres => "SERIAL PRIMARY KEY",
        Kind::Mariadb => "INTEGER AUTO_INCREMENT PRIMARY KEY",
    };
    let mut tables = format!(
        "CREATE TABLE lists (id {counted}, name VARCHAR(50) NOT NULL UNIQUE, rank INTEGER UNIQUE);
         CREATE TABLE items (id INTEGER PRIMARY KEY, list_id INTEGER NOT NULL, position INTEGER NOT NULL,
             FOREIGN KEY (list_id) REFERENCES lists (id) ON DELETE CASCADE);
         CREATE TABLE pairs (id INTEGER PRIMARY KEY, other_id INTEGER, version INTEGER NOT NULL DEFAULT 1,
             FOREIGN KEY (other_id) REFERENCES pairs (id));
         CREATE TABLE tight (id INTEGER PRIMARY KEY, other_id INTEGER NOT NULL,
             FOREIGN KEY (other_id) REFERENCES tight (id));
         CREATE TABLE persons (id INTEGER PRIMARY KEY, favourite_id INTEGER NULL);
         CREATE TABLE songs (id INTEGER PRIMARY KEY, singer_id INTEGER NOT NULL, FOREIGN KEY (singer_id) REFERENCES persons (id));
         INSERT INTO lists (name, rank) VALUES ('one', 1), ('two', NULL), ('three', NULL);
         INSERT INTO items VALUES (1, 1, 1), (2, 2, 1);
         INSERT INTO pairs (id) VALUES (1), (2), (3), (4);
         UPDATE pairs SET other_id = CASE id WHEN 1 THEN 2 WHEN 2 THEN 1 WHEN 3 THEN 1 END;
         INSERT INTO persons VALUES (1, NULL), (2, NULL);
         INSERT INTO songs VALUES (1, 1);"
    );
    // SQLite has no other way to add the key that closes the circle.
    tables.push_str(match KIND {
        Kind::Sqlite => {
            "DROP TABLE songs; DROP TABLE persons;
             CREATE TABLE persons (id INTEGER PRIMARY KEY, favourite_id INTEGER REFERENCES songs (id));
             CREATE TABLE songs (id INTEGER PRIMARY KEY, singer_id INTEGER NOT NULL REFERENCES persons (id));
             INSERT INTO persons VALUES (1, NULL), (2, NULL); INSERT INTO songs VALUES (1, 1);"
        }
        _ => "ALTER TABLE persons ADD FOREIGN KEY (favourite_id) REFERENCES songs (id);",
    });
    tables.push_str("UPDATE persons SET favourite_id = 1;");
    tables
}

#[track_caller]
fn lists(body: impl Fn(&Shop<Conn>) -> Result<()>) {
    test_on(Fixture::sql("lists", tables()), |shop| body(shop));
}

fn all(shop: &Shop<Conn>) -> Vec<String> {
    shop.ask("SELECT name AS value FROM lists ORDER BY id")
}

fn rows(shop: &Shop<Conn>, table: &str) -> usize {
    shop.ask(&format!("SELECT 'x' AS value FROM {table}")).len()
}

#[test]
fn an_update_frees_a_unique_value_for_a_new_row() {
    lists(|shop| {
        inside(shop, |session| {
            // The default is another.
            session.find::<List>(1)?.write().rank = None;
            let new = session.add(NewList { name: "four".into(), rank: Some(1) })?;
            session.commit()?;
            assert_eq!(new.read().rank, Some(1));
            // A name is taken over.
            session.find::<List>(2)?.write().name = "second".into();
            session.add(NewList { name: "two".into(), rank: None })?;
            session.commit()
        })?;
        assert_eq!(all(shop), ["one", "second", "three", "four", "two"]);
        Ok(())
    });
}

#[test]
fn an_update_that_writes_the_key_of_a_new_row_waits_for_its_insert() {
    lists(|shop| {
        inside(shop, |session| {
            let one = session.find::<Pair>(4)?;
            one.write().other_id = Some(9);
            session.add(NewPair { id: 9, other_id: None })?;
            // This one frees nothing, and goes before.
            session.find::<List>(1)?.write().rank = None;
            session.add(NewList { name: "four".into(), rank: Some(1) })?;
            session.commit()?;
            assert_eq!(session.find::<Pair>(4)?.read().version, 2);
            Ok(())
        })?;
        assert_eq!(rows(shop, "pairs WHERE other_id = 9"), 1);
        Ok(())
    });
}

#[test]
fn a_child_that_is_written_and_its_deleted_parent_are_no_conflict() {
    for with in ["nothing", "a new row", "a touched row"] {
        lists(|shop| {
            inside(shop, |session| {
                let (item, list, other) =
                    (session.find::<Item>(1)?, session.find::<List>(1)?, session.find::<List>(2)?);
                item.write().position = 9;
                session.delete(&list)?;
                match with {
                    "a new row" => session.add(NewList { name: "one".into(), rank: Some(1) }).map(drop)?,
                    "a touched row" => other.write().rank = Some(1),
                    _ => {}
                }
                session.commit()?;
                assert_eq!((session.get::<Item>(1)?, item.state()), (None, RowState::Deleted));
                Ok(())
            })?;
            assert_eq!((rows(shop, "items"), rows(shop, "lists WHERE rank = 1")), (1, usize::from(with != "nothing")));
            Ok(())
        });
    }
}

#[test]
fn a_row_that_is_moved_elsewhere_does_not_hold_back_another_delete() {
    lists(|shop| {
        inside(shop, |session| {
            // From the second list to the third, while the first is replaced: by the same flush, so everything is found
            // first.
            let (item, one) = (session.find::<Item>(2)?, session.find::<List>(1)?);
            item.write().list_id = 3;
            session.delete(&one)?;
            session.add(NewList { name: "one".into(), rank: Some(1) })?;
            session.commit()
        })?;
        assert_eq!(
            (all(shop), rows(shop, "items WHERE list_id = 3")),
            (vec!["two".into(), "three".into(), "one".into()], 1)
        );
        inside(shop, |session| {
            // Away from the one that goes.
            let (item, two, three) = (session.find::<Item>(2)?, session.find::<List>(2)?, session.find::<List>(3)?);
            item.write().list_id = 2;
            session.delete(&three)?;
            two.write().rank = Some(7);
            session.commit()
        })?;
        assert_eq!((rows(shop, "lists"), rows(shop, "items WHERE list_id = 2")), (2, 1));
        inside(shop, |session| {
            // Away from the one that goes, whose name a new row has.
            let (item, two) = (session.find::<Item>(2)?, session.find::<List>(2)?);
            let other = session.add(NewList { name: "other".into(), rank: None })?;
            session.flush()?;
            item.write().list_id = other.read().id;
            session.delete(&two)?;
            session.add(NewList { name: "two".into(), rank: Some(9) })?;
            session.commit()
        })?;
        assert_eq!((rows(shop, "lists"), rows(shop, "items")), (3, 1));
        Ok(())
    });
}

#[test]
fn rows_of_one_table_that_refer_to_each_other_are_deleted() {
    lists(|shop| {
        // With a version, one by one, and with a third row that refers into the circle.
        inside(shop, |session| {
            let rows = [session.find::<Pair>(1)?, session.find::<Pair>(2)?, session.find::<Pair>(3)?];
            rows.iter().try_for_each(|row| session.delete(row))?;
            session.flush()?;
            assert!(rows.iter().all(|row| row.state() == RowState::Deleted));
            assert_eq!(rows[0].read().other_id, Some(2));
            session.rollback()?;
            assert_eq!(session.find::<Pair>(1)?.read().version, 1);
            rows.iter().try_for_each(|row| session.delete(row))?;
            session.commit()
        })?;
        assert_eq!(rows(shop, "pairs"), 1);
        elsewhere(shop, "INSERT INTO pairs (id) VALUES (1), (2); UPDATE pairs SET other_id = 3 - id WHERE id < 3");
        inside(shop, |session| {
            let rows = session.get_many::<PlainPair>([1, 2, 4])?;
            rows.iter().flatten().try_for_each(|row| session.delete(row))?;
            session.commit()
        })?;
        assert_eq!(rows(shop, "pairs"), 0);
        Ok(())
    });
}

#[test]
fn cycle_of_not_null_keys_is_deleted_by_one_statement() {
    lists(|shop| {
        if KIND == Kind::Mariadb {
            // It checks foreign keys row by row, so such rows cannot be made.
            return Ok(());
        }
        elsewhere(shop, "INSERT INTO tight VALUES (1, 2), (2, 1)");
        inside(shop, |session| {
            let rows = session.get_many::<Tight>([1, 2])?;
            rows.iter().flatten().try_for_each(|row| session.delete(row))?;
            session.commit()
        })?;
        assert_eq!(rows(shop, "tight"), 0);
        Ok(())
    });
}

#[test]
fn written_reference_breaks_a_cycle_of_deleted_rows() {
    for song_first in [false, true] {
        lists(|shop| {
            inside(shop, |session| {
                // Of two tables.
                let (person, song) = if song_first {
                    let song = session.find::<Song>(1)?;
                    (session.find::<Person>(1)?, song)
                } else {
                    let person = session.find::<Person>(1)?;
                    (person, session.find::<Song>(1)?)
                };
                let other = session.find::<Person>(2)?;
                person.write().favourite_id = None;
                other.write().favourite_id = None;
                session.delete(&person)?;
                session.delete(&song)?;
                session.commit()?;
                // Of one.
                let (one, two, three) = (session.find::<Pair>(1)?, session.find::<Pair>(2)?, session.find::<Pair>(3)?);
                one.write().other_id = None;
                [&one, &two, &three].into_iter().try_for_each(|row| session.delete(row))?;
                session.commit()
            })?;
            assert_eq!((rows(shop, "persons"), rows(shop, "songs"), rows(shop, "pairs")), (1, 0, 1));
            Ok(())
        });
    }
}

#[test]
fn cycle_of_two_tables_is_broken_at_a_nullable_key() {
    for song_first in [false, true] {
        lists(|shop| {
            inside(shop, |session| {
                if song_first {
                    session.find::<Song>(1)?;
                }
                let (one, two, song) =
                    (session.find::<Person>(1)?, session.find::<Person>(2)?, session.find::<Song>(1)?);
                session.delete(&one)?;
                session.delete(&two)?;
                session.delete(&song)?;
                session.commit()
            })?;
            assert_eq!((rows(shop, "persons"), rows(shop, "songs")), (0, 0));
            Ok(())
        });
    }
}

const REGIONS: &str = "CREATE TABLE regions (code VARCHAR(20) PRIMARY KEY, parent_code VARCHAR(20),
    FOREIGN KEY (parent_code) REFERENCES regions (code))";

/// A key that the program makes.
#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(code))]
#[entity(new = NewRegion, connection = AnyConnection)]
pub struct Region {
    pub code: String,
    #[entity(references = Region)]
    pub parent_code: Option<String>,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = cities, primary_key(code))]
#[entity(new = NewCity, connection = AnyConnection)]
pub struct City {
    pub code: String,
    /// Its mayor.
    #[entity(references = Mayor)]
    pub region_code: Option<String>,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(code))]
#[entity(new = NewMayor, connection = AnyConnection)]
pub struct Mayor {
    pub code: String,
    #[entity(references = City)]
    pub city_code: Option<String>,
}

/// MariaDB checks foreign keys row by row, and compares texts without their letter case.
#[test]
fn rows_that_refer_to_another_spelling_of_a_key_are_deleted_in_order() {
    lists(|shop| {
        elsewhere(shop, REGIONS);
        let spelling = if KIND == Kind::Mariadb { "WORLD" } else { "world" };
        elsewhere(shop, "INSERT INTO regions VALUES ('world', NULL)");
        elsewhere(shop, &format!("INSERT INTO regions VALUES ('eu', '{spelling}')"));
        inside(shop, |session| {
            let (world, eu) = (session.find::<Region>("world")?, session.find::<Region>("eu")?);
            session.delete(&world)?;
            session.delete(&eu)?;
            session.commit()
        })?;
        assert_eq!(rows(shop, "regions"), 0);
        Ok(())
    });
}

fn region(code: &str, parent: Option<&str>) -> NewRegion {
    NewRegion { code: code.into(), parent_code: parent.map(Into::into) }
}

#[test]
fn a_new_row_waits_for_new_rows_whose_keys_the_program_has_made() {
    lists(|shop| {
        elsewhere(shop, REGIONS);
        inside(shop, |session| {
            session.add(region("utrecht", Some("nl")))?;
            session.add(region("nl", Some("eu")))?;
            session.add(region("eu", Some("world")))?;
            session.add(region("world", None))?;
            session.add(region("itself", Some("itself")))?;
            session.add(region("be", Some("eu")))?;
            session.commit()
        })?;
        assert_eq!(rows(shop, "regions"), 6);
        inside(shop, |session| {
            session.add(region("a", Some("missing")))?;
            assert_is!(kind_of(&session.flush().expect_err("no parent")), Some(DatabaseErrorKind::ForeignKeyViolation));
            session.rollback()
        })
    });
}

#[test]
fn new_rows_of_types_that_refer_to_each_other_wait_for_each_other() {
    lists(|shop| {
        let (first, second) = match KIND {
            Kind::Sqlite => (", FOREIGN KEY (region_code) REFERENCES mayors (code)", ""),
            _ => ("", "ALTER TABLE cities ADD FOREIGN KEY (region_code) REFERENCES mayors (code)"),
        };
        elsewhere(
            shop,
            &format!(
                "CREATE TABLE cities (code VARCHAR(20) PRIMARY KEY, region_code VARCHAR(20){first}); \
                 CREATE TABLE mayors (code VARCHAR(20) PRIMARY KEY, city_code VARCHAR(20), FOREIGN KEY (city_code) REFERENCES cities (code)); \
                 {second}"
            ),
        );
        for turned in [false, true] {
            inside(shop, |session| {
                let cities = || {
                    session.add(NewCity { code: "one".into(), region_code: Some("m".into()) })?;
                    session.add(NewCity { code: "two".into(), region_code: None }).map(drop)
                };
                if !turned {
                    cities()?;
                }
                session.add(NewMayor { code: "m".into(), city_code: Some("two".into()) })?;
                if turned {
                    cities()?;
                }
                session.flush()?;
                session.rollback()
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_chain_of_rows_is_added_and_deleted() {
    lists(|shop| {
        elsewhere(shop, REGIONS);
        inside(shop, |session| {
            let name = |row: u32| format!("r{row}");
            let parent = |row: u32| (row < 2_999).then(|| name(row + 1));
            let all: Vec<_> = (0..3_000)
                .map(|row| session.add(NewRegion { code: name(row), parent_code: parent(row).map(Into::into) }))
                .collect::<Result<_>>()?;
            session.flush()?;
            all.iter().rev().try_for_each(|row| session.delete(row))?;
            session.commit()
        })?;
        assert_eq!(rows(shop, "regions"), 0);
        Ok(())
    });
}
