//! Which of the rows that an INSERT gives back is which, through the derive.

use diesel_session::{Entity, NewEntity, Tracked};

use diesel_session::unit_of_work::Fk;

use super::*;

diesel::table! { things (id) { id -> Integer, name -> Text, size -> Integer, code -> Nullable<Text>, } }
diesel::table! { marks (name) { name -> Text, size -> Integer, } }

#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[entity(new = NewThing, connection = AnyConnection)]
pub struct Thing {
    #[entity(generated)]
    pub id: i32,
    pub name: String,
    pub size: i32,
    #[entity(generated)]
    pub code: Option<String>,
}

/// A column that is set by a trigger after the INSERT.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = strict_things)]
#[entity(new = NewStrictThing, connection = AnyConnection)]
pub struct StrictThing {
    #[entity(generated)]
    pub id: i32,
    pub name: String,
    #[entity(generated)]
    pub code: String,
}

diesel::table! {
    #[sql_name = "things"]
    strict_things (id) { id -> Integer, name -> Text, code -> Text, }
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(primary_key(name))]
#[entity(new = NewMark, connection = AnyConnection)]
pub struct Mark {
    pub name: String,
    pub size: i32,
}

/// Foreign keys are compared as well.
#[derive(Debug, Clone, Insertable, NewEntity)]
#[diesel(table_name = articles)]
#[entity(Article, connection = AnyConnection)]
pub struct HandMadeArticle {
    pub writer_id: Fk<Writer>,
    pub editor_id: Option<Fk<Writer>>,
    pub title: &'static str,
    #[entity(write_only)]
    pub body: &'static str,
}

fn tables() -> String {
    let counted = match KIND {
        Kind::Sqlite => "INTEGER PRIMARY KEY",
        Kind::Postgres => "SERIAL PRIMARY KEY",
        Kind::Mariadb => "INTEGER AUTO_INCREMENT PRIMARY KEY",
    };
    format!(
        "CREATE TABLE things (id {counted}, name VARCHAR(50) NOT NULL, size INTEGER NOT NULL DEFAULT 0, code VARCHAR(50));
         CREATE TABLE marks (name VARCHAR(50) PRIMARY KEY, size INTEGER NOT NULL);"
    )
}

#[track_caller]
fn things(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
    test_on(Fixture::sql("things", tables()), body);
}

/// Lets PostgreSQL or MariaDB change new rows of a table; SQLite cannot. Whether it does.
fn rewrites(shop: &Shop<Conn>, table: &str, column: &str, value: &str) -> bool {
    match KIND {
        Kind::Sqlite => return false,
        Kind::Postgres => elsewhere(
            shop,
            &format!(
                "CREATE FUNCTION rewrite_{table}() RETURNS trigger AS $$ BEGIN NEW.{column} := {value}; RETURN NEW; END $$ LANGUAGE plpgsql;
                 CREATE TRIGGER rewritten BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION rewrite_{table}()"
            ),
        ),
        Kind::Mariadb => elsewhere(
            shop,
            &format!("CREATE TRIGGER rewritten_{table} BEFORE INSERT ON {table} FOR EACH ROW SET NEW.{column} = {value}"),
        ),
    }
    true
}

fn added(session: &Session<Conn>, names: &[&str]) -> Result<Vec<Tracked<Thing>>> {
    names.iter().zip(1..).map(|(name, size)| session.add(NewThing { name: (*name).into(), size })).collect()
}

#[test]
fn derived_rows_name_the_columns_that_differ() {
    let row = Thing { id: 9, name: "b".into(), size: 1, code: None };
    assert_eq!(NewEntity::disagreements(&NewThing { name: "a".into(), size: 1 }, &row), 0b01);
    assert_eq!(NewEntity::disagreements(&NewThing { name: "b".into(), size: 2 }, &row), 0b10);
    assert_eq!(NewEntity::disagreements(&NewThing { name: "b".into(), size: 1 }, &row), 0);
    let new = HandMadeArticle { writer_id: 1.into(), editor_id: Some(2.into()), title: "t", body: "b" };
    let row = |writer_id, editor_id, title: &str| Article {
        id: 1,
        writer_id,
        editor_id,
        title: title.into(),
        body: "x".into(),
    };
    assert_eq!(new.disagreements(&row(1, Some(2), "t")), 0);
    assert_eq!(new.disagreements(&row(3, Some(2), "t")), 0b001);
    assert_eq!(new.disagreements(&row(1, None, "t")), 0b010);
    assert_eq!(new.disagreements(&row(1, Some(2), "u")), 0b100);
}

#[test]
fn rows_that_come_back_in_another_order_are_matched_by_their_values() {
    things(|shop| {
        // As if the database had given the first row the second key.
        let swaps = "CASE NEW.name WHEN 'a' THEN 'b' WHEN 'b' THEN 'a' ELSE NEW.name END";
        let does = rewrites(shop, "things", "name", swaps);
        if does {
            elsewhere(shop, "UPDATE things SET size = 0");
        }
        inside(shop, |session| {
            let rows: Vec<_> = ["c", "a", "b"]
                .into_iter()
                .map(|name| session.add(NewThing { name: name.into(), size: 1 }))
                .collect::<Result<_>>()?;
            session.flush()?;
            let is_one_statement = std::any::type_name::<Conn>() == std::any::type_name::<PgConnection>();
            if is_one_statement {
                assert_eq!(rows.iter().map(|row| row.read().name.clone()).collect::<Vec<_>>(), ["c", "a", "b"]);
                assert!(rows[1].read().id > rows[2].read().id);
            }
            session.commit()
        })
    });
}

#[test]
fn values_that_the_database_changes_do_not_fail_a_flush() {
    for value in ["UPPER(TRIM(NEW.name))", "'same'", "CONCAT(NEW.name, '!')"] {
        things(|shop| {
            let does = rewrites(shop, "things", "name", value);
            inside(shop, |session| {
                let rows = added(session, &[" a", "b ", "B", "b", "c!"])?;
                session.flush()?;
                assert!(rows.iter().zip(1..).all(|(row, size)| row.read().size == size));
                assert_eq!(rows[1].read().name != "b ", does);
                let one = added(session, &["d"])?.remove(0);
                session.commit()?;
                assert_eq!(one.read().size, 1);
                Ok(())
            })
        });
    }
}

#[test]
fn keys_that_the_database_changes_do_not_fail_a_flush() {
    things(|shop| {
        let does = rewrites(shop, "marks", "name", "UPPER(NEW.name)");
        inside(shop, |session| {
            let mark = |(name, size): (&str, i32)| session.add(NewMark { name: name.into(), size });
            let rows: Vec<_> = [("a", 1), ("b", 2), ("c", 3)].into_iter().map(mark).collect::<Result<_>>()?;
            session.flush()?;
            let one = mark(("d", 4))?;
            session.flush()?;
            for (row, size) in rows.iter().chain([&one]).zip(1..) {
                assert_eq!((row.read().size, row.read().name == row.read().name.to_uppercase()), (size, does));
            }
            session.commit()
        })
    });
}

#[test]
fn rows_that_a_trigger_keeps_out_are_counted() {
    things(|shop| {
        match KIND {
            Kind::Postgres => elsewhere(
                shop,
                "CREATE FUNCTION skip() RETURNS trigger AS $$ BEGIN IF NEW.name = 'no' THEN RETURN NULL; END IF; RETURN NEW; END $$ LANGUAGE plpgsql;
                 CREATE TRIGGER skipped BEFORE INSERT ON things FOR EACH ROW EXECUTE FUNCTION skip()",
            ),
            Kind::Sqlite => elsewhere(
                shop,
                "CREATE TRIGGER skipped BEFORE INSERT ON things WHEN NEW.name = 'no' BEGIN SELECT RAISE(IGNORE); END",
            ),
            // A trigger there changes rows or fails.
            Kind::Mariadb => return Ok(()),
        }
        inside(shop, |session| {
            for names in [&["no"][..], &["a", "no", "b"]] {
                added(session, names)?;
                let error = session.flush().expect_err("one is not there");
                assert!(
                    error.kind() == ErrorKind::NotReturned
                        && error.entity() == Some("Thing")
                        && error.to_string().contains("trigger"),
                    "{error}"
                );
                session.rollback()?;
            }
            // The advice.
            let no = (things::name.eq("no"), things::size.eq(1));
            assert_eq!(session.execute(diesel::insert_into(things::table).values(no))?, 0);
            Ok(())
        })
    });
}

#[test]
fn a_column_that_a_trigger_sets_afterwards_has_advice_that_works() {
    things(|shop| {
        match KIND {
            Kind::Postgres => elsewhere(
                shop,
                "CREATE FUNCTION code() RETURNS trigger AS $$ BEGIN UPDATE things SET code = 'c' || id WHERE id = NEW.id; RETURN NULL; END $$ LANGUAGE plpgsql;
                 CREATE TRIGGER coded AFTER INSERT ON things FOR EACH ROW EXECUTE FUNCTION code()",
            ),
            Kind::Sqlite => elsewhere(
                shop,
                "CREATE TRIGGER coded AFTER INSERT ON things BEGIN UPDATE things SET code = 'c' || NEW.id WHERE id = NEW.id; END",
            ),
            // A trigger there may not write to its own table.
            Kind::Mariadb => return Ok(()),
        }
        inside(shop, |session| {
            session.add(NewStrictThing { name: "a".into() })?;
            let error = session.flush().expect_err("NULL is no text");
            let text = format!("{error:#}");
            assert!(text.contains("AFTER trigger") && text.contains("refresh"), "{text}");
            session.rollback()?;
            let thing = added(session, &["a"])?.remove(0);
            session.flush()?;
            assert_eq!(thing.read().code, None);
            session.refresh(&thing)?;
            assert_eq!(thing.read().code, Some(format!("c{}", thing.read().id)));
            session.commit()
        })
    });
}
