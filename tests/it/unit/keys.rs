//! Keys that the database spells or compares otherwise than Rust does.

use chrono::{NaiveDate, NaiveDateTime};
use diesel::backend::Backend;
use diesel::deserialize::FromSql;
use diesel::serialize::{Output, ToSql};
use diesel_session::Entity;
use diesel_session::unit_of_work::{Fk, RowState};

use super::*;

diesel::table! { tags (name) { name -> Text, weight -> Integer, } }
diesel::table! { codes (code) { code -> Text, part -> Integer, name -> Text, } }
diesel::table! { code_lines (code, number) { code -> Text, number -> Integer, name -> Text, } }
diesel::table! { moments (at) { at -> Timestamp, name -> Text, } }
diesel::table! { members (id) { id -> Integer, name -> Text, } }
diesel::table! { badges (id) { id -> Integer, member_id -> Integer, } }
diesel::table! { tickets (tenant_id, id) { tenant_id -> Integer, id -> Integer, name -> Text, } }
diesel::table! { twins (code) { code -> Integer, name -> Text, } }
diesel::table! { events (id) { id -> BigInt, name -> Text, } }
diesel::table! { files (id) { id -> Integer, name -> Text, body -> Binary, } }

/// A key in which the database passes over letter case.
#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(name))]
#[entity(new = NewTag, connection = AnyConnection)]
pub struct Tag {
    pub name: String,
    pub weight: i32,
}

/// `CHAR(5)`.
#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(code))]
#[entity(new = NewCode, connection = AnyConnection)]
pub struct Code {
    pub code: String,
    pub part: i32,
    pub name: String,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = code_lines, primary_key(code, number))]
#[entity(new = NewLine, connection = AnyConnection)]
pub struct Line {
    #[entity(references = Code)]
    pub code: String,
    pub number: i32,
    pub name: String,
}

/// A column that keeps whole seconds.
#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(at))]
#[entity(new = NewMoment, connection = AnyConnection)]
pub struct Moment {
    pub at: NaiveDateTime,
    pub name: String,
}

/// A key of a type of its own.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, diesel::expression::AsExpression, diesel::deserialize::FromSqlRow,
)]
#[diesel(sql_type = Integer)]
pub struct MemberId(pub i32);

impl<DB: Backend> ToSql<Integer, DB> for MemberId
where
    i32: ToSql<Integer, DB>,
{
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, DB>) -> diesel::serialize::Result {
        self.0.to_sql(out)
    }
}

impl<DB: Backend> FromSql<Integer, DB> for MemberId
where
    i32: FromSql<Integer, DB>,
{
    fn from_sql(bytes: DB::RawValue<'_>) -> diesel::deserialize::Result<Self> {
        i32::from_sql(bytes).map(Self)
    }
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(new = NewMember, connection = AnyConnection)]
pub struct Member {
    #[entity(generated)]
    pub id: MemberId,
    pub name: String,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(new = NewBadge, connection = AnyConnection)]
pub struct Badge {
    #[entity(generated)]
    pub id: i32,
    #[entity(references = Member)]
    pub member_id: MemberId,
}

/// A key of two columns, of which the database counts one.
#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(tenant_id, id))]
#[entity(new = NewTicket, connection = AnyConnection)]
pub struct Ticket {
    pub tenant_id: i32,
    #[entity(generated)]
    pub id: i32,
    pub name: String,
}

/// Its key is not unique.
#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(code))]
#[entity(connection = AnyConnection)]
pub struct Twin {
    pub code: i32,
    pub name: String,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(new = NewFile, connection = AnyConnection)]
pub struct File {
    #[entity(generated)]
    pub id: i32,
    pub name: String,
    pub body: Vec<u8>,
}

fn tables() -> String {
    let (before, tag, counted, moment, bytes, ticket) = match KIND {
        Kind::Sqlite => (
            "",
            "VARCHAR(20) COLLATE NOCASE",
            "INTEGER PRIMARY KEY",
            "TIMESTAMP",
            "BLOB",
            "tenant_id INTEGER NOT NULL, id INTEGER PRIMARY KEY, name VARCHAR(20) NOT NULL, UNIQUE (tenant_id, id)",
        ),
        Kind::Postgres => (
            "CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);",
            "VARCHAR(20) COLLATE nocase",
            "SERIAL PRIMARY KEY",
            "TIMESTAMP(0)",
            "BYTEA",
            "tenant_id INTEGER NOT NULL, id SERIAL, name VARCHAR(20) NOT NULL, PRIMARY KEY (tenant_id, id)",
        ),
        Kind::Mariadb => (
            "",
            "VARCHAR(20)",
            "INTEGER AUTO_INCREMENT PRIMARY KEY",
            "DATETIME",
            "LONGBLOB",
            "tenant_id INTEGER NOT NULL, id INTEGER AUTO_INCREMENT, name VARCHAR(20) NOT NULL, PRIMARY KEY (tenant_id, id), KEY (id)",
        ),
    };
    format!(
        "{before}
         CREATE TABLE tags (name {tag} PRIMARY KEY, weight INTEGER NOT NULL);
         INSERT INTO tags VALUES ('Diesel', 1), ('Rust', 2), ('orm', 3);
         CREATE TABLE codes (code CHAR(5) PRIMARY KEY, part INTEGER NOT NULL, name VARCHAR(20) NOT NULL);
         CREATE TABLE code_lines (code CHAR(5) NOT NULL, number INTEGER NOT NULL, name VARCHAR(20) NOT NULL, PRIMARY KEY (code, number),
             FOREIGN KEY (code) REFERENCES codes (code));
         CREATE TABLE moments (at {moment} PRIMARY KEY, name VARCHAR(20) NOT NULL);
         CREATE TABLE members (id {counted}, name VARCHAR(20) NOT NULL);
         CREATE TABLE badges (id {counted}, member_id INTEGER NOT NULL, FOREIGN KEY (member_id) REFERENCES members (id));
         CREATE TABLE tickets ({ticket});
         CREATE TABLE twins (code INTEGER NOT NULL, name VARCHAR(20) NOT NULL);
         INSERT INTO twins VALUES (1, 'one'), (1, 'other'), (2, 'two'), (3, 'three'), (3, 'third');
         CREATE TABLE files (id {counted}, name VARCHAR(20) NOT NULL, body {bytes} NOT NULL);"
    )
}

#[track_caller]
fn keyed(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
    test_on(Fixture::sql("keys", tables()), body);
}

#[test]
fn get_many_finds_every_row_that_get_finds() {
    keyed(|shop| {
        inside(shop, |session| {
            let asked = ["diesel", "DIESEL", "Diesel", "nothing", "rust", "orm", "none"];
            let found = session.get_many::<Tag>(asked)?;
            for (id, found) in asked.into_iter().zip(&found) {
                assert_eq!(&session.get::<Tag>(id)?, found, "{id}");
            }
            // One row is one handle.
            assert!(found[0].is_some() && found[0] == found[1] && found[0] == found[2] && found[4].is_some());
            assert_eq!((&found[3], &found[6]), (&None, &None));
            // Many that are not there.
            let asked: Vec<String> = (0..150).map(|n| format!("t{n}")).chain(["RUST".to_owned()]).collect();
            let found = session.get_many::<Tag>(asked)?;
            assert_eq!(found.iter().flatten().count(), 1);
            Ok(())
        })?;
        shop.scope().autocommit().run(|| {
            let found = DB.session()?.get_many::<Tag>(["diesel", "rust", "orm"])?;
            assert_eq!(found.iter().flatten().count(), 3);
            Ok(())
        })
    });
}

#[test]
fn a_row_that_is_asked_for_in_another_spelling_is_read_once() {
    keyed(|shop| {
        inside(shop, |session| {
            diesel_session::assert_queries!(1, || {
                let row = session.find::<Tag>("DIESEL")?;
                assert_eq!(session.find::<Tag>("DIESEL")?, row);
                assert_eq!(session.find::<Tag>(row.read().name.as_str())?, row);
                Ok(())
            })
        })
    });
}

#[test]
fn rows_under_another_spelling_are_written_and_deleted() {
    keyed(|shop| {
        inside(shop, |session| {
            let found = session.get_many::<Tag>(["DIESEL", "rust"])?;
            found.iter().flatten().for_each(|tag| tag.write().weight += 10);
            session.commit()?;
            session.delete(&session.find::<Tag>("ORM")?)?;
            session.add(NewTag { name: "Orm".into(), weight: 9 })?;
            session.commit()
        })?;
        let weights = "SELECT CAST(weight AS CHAR(2)) AS value FROM tags ORDER BY weight";
        let weights: Vec<String> = shop.ask(weights).into_iter().map(|weight| weight.trim().to_owned()).collect();
        assert_eq!(weights, ["9", "11", "12"]);
        Ok(())
    });
}

#[test]
fn keys_with_blanks_are_found_updated_refreshed_and_deleted() {
    keyed(|shop| {
        inside(shop, |session| {
            let add = |code: &str| session.add(NewCode { code: code.into(), part: 1, name: code.into() });
            let added = [add("ab")?, add("cd")?, add("ef")?, add("full5")?, add("x")?];
            session.add(NewLine { code: added[0].key(), number: 1, name: "first".into() })?;
            session.add(NewLine { code: added[0].key(), number: 2, name: "second".into() })?;
            session.commit()?;
            let code = added[0].read().code.clone();
            assert_eq!(session.find::<Code>("ab")?, added[0]);
            assert_eq!(session.find::<Code>(code.clone())?, added[0]);
            session.refresh(&added[0])?;
            added[0].write().name = "one".into();
            session.commit()?;
            // Several in one flush.
            added.iter().for_each(|code| code.write().part = 2);
            let lines = session.get_many::<Line>([(code.clone(), 1), (code.clone(), 2), ("cd".into(), 1)])?;
            assert_eq!(lines.iter().flatten().count(), 2);
            lines.iter().flatten().for_each(|line| line.write().name = "changed".into());
            session.commit()?;
            let again = session.get_many::<Code>(["ab", "cd", "none"])?;
            assert_eq!((&again[0], &again[1], &again[2]), (&Some(added[0].clone()), &Some(added[1].clone()), &None));
            assert_eq!(session.get_many::<Code>([code, added[1].read().code.clone()])?.iter().flatten().count(), 2);
            assert!(added.iter().try_for_each(|code| session.refresh(code)).is_ok());
            assert!(added.iter().all(|code| code.read().part == 2));
            lines.iter().flatten().try_for_each(|line| session.delete(line))?;
            session.delete(&added[1])?;
            session.flush()?;
            session.delete(&added[0])?;
            session.delete(&added[2])?;
            session.commit()?;
            assert_eq!(added[2].state(), RowState::Deleted);
            Ok(())
        })?;
        assert_eq!(shop.ask("SELECT name AS value FROM codes ORDER BY name"), ["full5", "x"]);
        Ok(())
    });
}

#[test]
fn texts_that_differ_in_blanks_stay_two_rows() {
    keyed(|shop| {
        if KIND == Kind::Mariadb {
            // It takes them for one.
            return Ok(());
        }
        elsewhere(shop, "CREATE TABLE words (name VARCHAR(20) PRIMARY KEY, weight INTEGER NOT NULL)");
        inside(shop, |session| {
            let (one, other) = (NewWord { name: "a".into(), weight: 1 }, NewWord { name: "a ".into(), weight: 2 });
            let two = [session.add(one)?, session.add(other)?];
            session.commit()?;
            assert_ne!(session.find::<Word>("a")?, session.find::<Word>("a ")?);
            two[1].write().weight = 20;
            session.commit()?;
            elsewhere(shop, "DELETE FROM words WHERE name = 'a '");
            assert_eq!(session.get::<Word>("a ")?, None);
            assert_eq!(session.find::<Word>("a")?.read().weight, 1);
            session.delete(&two[0])
        })
    });
}

diesel::table! { words (name) { name -> Text, weight -> Integer, } }

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(name))]
#[entity(new = NewWord, connection = AnyConnection)]
pub struct Word {
    pub name: String,
    pub weight: i32,
}

#[test]
fn keys_that_the_column_rounds_are_read_back() {
    keyed(|shop| {
        let day = NaiveDate::from_ymd_opt(2026, 1, 2).expect("a day");
        let at = |second, nano| day.and_hms_nano_opt(3, 4, second, nano).expect("a time");
        inside(shop, |session| {
            let one = session.add(NewMoment { at: at(1, 250_000_123), name: "one".into() })?;
            session.flush()?;
            let more: Vec<_> = (2..5)
                .map(|second| session.add(NewMoment { at: at(second * 10, 100_000_000), name: second.to_string() }))
                .collect::<Result<_>>()?;
            session.commit()?;
            for moment in more.iter().chain([&one]) {
                let key = moment.read().at;
                assert_eq!(&session.find::<Moment>(key)?, moment);
                moment.write().name.push('!');
            }
            session.commit()?;
            more.iter().try_for_each(|moment| session.delete(moment))?;
            session.commit()
        })?;
        assert_eq!(shop.ask("SELECT name AS value FROM moments"), ["one!"]);
        Ok(())
    });
}

#[test]
fn generated_keys_of_a_custom_type_are_read_back() {
    keyed(|shop| {
        inside(shop, |session| {
            let members: Vec<_> =
                (0..5).map(|n| session.add(NewMember { name: n.to_string() })).collect::<Result<_>>()?;
            let badges: Vec<_> = members
                .iter()
                .map(|member| session.add(NewBadge { member_id: member.key() }))
                .collect::<Result<_>>()?;
            session.commit()?;
            for (n, (member, badge)) in members.iter().zip(&badges).enumerate() {
                assert_eq!((member.read().name.clone(), badge.read().member_id), (n.to_string(), member.read().id));
            }
            let first = members[0].read().id;
            assert_eq!(session.find::<Member>(first)?, members[0]);
            assert_eq!(Fk::<Member>::new(first), members[0].key());
            assert_eq!(session.get_many::<Member>([first, MemberId(0)])?.iter().flatten().count(), 1);
            Ok(())
        })
    });
}

#[test]
fn composite_key_with_a_generated_column_is_read_back() {
    keyed(|shop| {
        inside(shop, |session| {
            let tickets: Vec<_> = (0..6)
                .map(|n| session.add(NewTicket { tenant_id: n % 2, name: n.to_string() }))
                .collect::<Result<_>>()?;
            session.commit()?;
            for (n, ticket) in tickets.iter().enumerate() {
                let (tenant_id, id) = (ticket.read().tenant_id, ticket.read().id);
                assert_eq!((tenant_id, ticket.read().name.clone()), (n as i32 % 2, n.to_string()));
                assert_eq!(&session.find::<Ticket>((tenant_id, id))?, ticket);
                ticket.write().name.push('!');
            }
            session.commit()?;
            session.delete(&tickets[0])?;
            session.commit()
        })?;
        assert_eq!(shop.ask("SELECT name AS value FROM tickets ORDER BY id"), ["1!", "2!", "3!", "4!", "5!"]);
        Ok(())
    });
}

#[test]
fn a_key_that_is_not_unique_is_an_error_before_anything_is_committed() {
    keyed(|shop| {
        inside(shop, |session| {
            let error = session.get::<Twin>(1).expect_err("two rows");
            assert!(
                error.kind() == ErrorKind::NotUnique
                    && error.entity() == Some("Twin")
                    && error.to_string().contains("SELECT of "),
                "{error:?}"
            );
            assert_error!(session.get_many::<Twin>([1, 2]), NotUnique);
            session.rollback()?;
            let twins = session.track::<Twin>(twins::table.order((twins::code, twins::name)))?;
            twins[0].write().name = "changed".into();
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::NotUnique && error.to_string().contains("UPDATE of ") && error.to_string().contains(" 2 rows"));
            session.rollback()?;
            // Several rows, one of them sound.
            let twins = session.track::<Twin>(twins::table.order((twins::code, twins::name)))?;
            twins.iter().for_each(|twin| twin.write().name = "changed".into());
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::NotUnique && error.to_string().contains("UPDATE of "));
            session.rollback()?;
            let twins = session.track::<Twin>(twins::table.order((twins::code, twins::name)))?;
            session.delete(&twins[0])?;
            session.delete(&twins[2])?;
            let error = session.commit().expect_err("three rows for two keys");
            assert!(
                error.kind() == ErrorKind::NotUnique
                    && error.to_string().contains("DELETE of ")
                    && error.to_string().contains("primary_key"),
                "{error}"
            );
            session.rollback()
        })?;
        assert_eq!(
            shop.ask("SELECT name AS value FROM twins ORDER BY name"),
            ["one", "other", "third", "three", "two"]
        );
        Ok(())
    });
}

#[test]
fn rows_that_are_large_together_go_in_several_statements() {
    keyed(|shop| {
        // MariaDB's server takes 16 MB at once.
        let rows = if KIND == Kind::Mariadb { 20 } else { 2 };
        inside(shop, |session| {
            let body = |n: usize| vec![n as u8; 1 << 20];
            let files: Vec<_> = (0..rows)
                .map(|n| session.add(NewFile { name: n.to_string(), body: body(n) }))
                .collect::<Result<_>>()?;
            session.commit()?;
            assert!(files.iter().enumerate().all(|(n, file)| file.read().body == body(n)));
            Ok(())
        })?;
        assert_eq!(shop.ask("SELECT name AS value FROM files").len(), rows);
        Ok(())
    });
}

#[test]
fn a_row_that_is_too_large_is_named_and_not_to_be_sent_again() {
    keyed(|shop| {
        if KIND != Kind::Mariadb {
            return Ok(());
        }
        inside(shop, |session| {
            let small = session.add(NewFile { name: "small".into(), body: Vec::new() })?;
            session.commit()?;
            session.add(NewFile { name: "large".into(), body: vec![7; 17 << 20] })?;
            let error = session.commit().expect_err("more than the server takes");
            assert!(
                error.kind() == ErrorKind::RowTooLarge && error.entity() == Some("File") && error.key().is_none(),
                "{error:?}"
            );
            assert!(!error.is_transient() && error.to_string().contains("max_allowed_packet"), "{error}");
            session.rollback()?;
            small.write().body = vec![7; 17 << 20];
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::RowTooLarge && error.key().is_some());
            session.rollback()?;
            // A column that is not written does not count.
            session.refresh(&small)?;
            small.write().name = "renamed".into();
            session.commit()
        })?;
        assert_eq!(shop.ask("SELECT name AS value FROM files"), ["renamed"]);
        Ok(())
    });
}

/// A key that the database makes, by whatever means.
#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(new = NewEvent, connection = AnyConnection)]
pub struct Event {
    #[entity(generated)]
    pub id: i64,
    pub name: String,
}

#[test]
fn a_key_of_a_sequence_or_a_trigger_is_not_taken_for_that_of_another_row() {
    for table in [
        "CREATE SEQUENCE numbers; CREATE TABLE events (id BIGINT NOT NULL DEFAULT NEXT VALUE FOR numbers PRIMARY KEY, name VARCHAR(50) NOT NULL)",
        "CREATE TABLE events (id BIGINT AUTO_INCREMENT PRIMARY KEY, name VARCHAR(50) NOT NULL); \
         CREATE TRIGGER ids BEFORE INSERT ON events FOR EACH ROW SET NEW.id = IF(NEW.name = 'new', 100, NEW.id)",
    ] {
        keyed(|shop| {
            if KIND != Kind::Mariadb {
                return Ok(());
            }
            elsewhere(shop, table);
            elsewhere(shop, "INSERT INTO events (name) VALUES ('one'), ('two')");
            let add_event = |session: &Session<Conn>| {
                let event = session.add(NewEvent { name: "new".into() })?;
                let error = session.flush().expect_err("the database does not tell the key");
                assert!(format!("{error:#}").contains("a key that the database made and does not tell"), "{error:#}");
                assert_is!(event.state(), RowState::Pending | RowState::Discarded);
                session.rollback()
            };
            // Another INSERT of the same transaction has counted.
            inside(shop, |session| {
                session.add(NewMember { name: "Ada".into() })?;
                session.flush()?;
                add_event(session)
            })?;
            // So has one that the unit of work does not know, and one of another transaction of the connection.
            inside(shop, |session| {
                raw(session, "INSERT INTO members (name) VALUES ('Bob')")?;
                add_event(session)?;
                raw(session, "INSERT INTO members (name) VALUES ('Bob')")?;
                session.commit()?;
                add_event(session)
            })
        });
    }
}
