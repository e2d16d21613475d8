//! The tables of the model test, and an entity for each.
//!
//! Every table has the same columns, so that one query reads all of them and one struct describes any row. Each entity
//! has the columns that it needs.

use diesel::prelude::*;
use diesel::sql_types::{Integer, Nullable, Text};
use diesel_session::Entity;

use super::rows::{Column, Row, Table};
use crate::per_database::{AnyConnection, Kind};

diesel::table! { users (id) { id -> Integer, code -> Nullable<Integer>, n -> Integer, m -> Integer, } }
diesel::table! { posts (id) { id -> Integer, parent -> Integer, n -> Integer, m -> Integer, } }
diesel::table! { comments (id) { id -> Integer, parent -> Integer, n -> Integer, m -> Integer, } }
diesel::table! { badges (id) { id -> Integer, parent -> Nullable<Integer>, n -> Integer, m -> Integer, } }
diesel::table! { nodes (id) { id -> Integer, parent -> Nullable<Integer>, code -> Nullable<Integer>, n -> Integer, m -> Integer, } }
diesel::table! { links (id) { id -> Integer, parent -> Nullable<Integer>, n -> Integer, m -> Integer, } }
diesel::table! { counters (id) { id -> Integer, n -> Integer, m -> Integer, version -> Integer, } }

diesel::allow_tables_to_appear_in_same_query!(users, counters);

/// The program makes the key; a code is unique.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = users)]
#[entity(new = NewUser, connection = AnyConnection)]
pub struct User {
    pub id: i32,
    pub code: Option<i32>,
    pub n: i32,
    pub m: i32,
}

/// The database makes the key; a post goes with its user.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = posts)]
#[entity(new = NewPost, connection = AnyConnection)]
pub struct Post {
    #[entity(generated)]
    pub id: i32,
    #[entity(references = User)]
    pub parent: i32,
    pub n: i32,
    pub m: i32,
}

/// A comment goes with its post, and so with the post's user.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = comments)]
#[entity(new = NewComment, connection = AnyConnection)]
pub struct Comment {
    pub id: i32,
    #[entity(references = Post)]
    pub parent: i32,
    pub n: i32,
    pub m: i32,
}

/// A badge loses its user.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = badges)]
#[entity(new = NewBadge, connection = AnyConnection)]
pub struct Badge {
    pub id: i32,
    #[entity(references = User)]
    pub parent: Option<i32>,
    pub n: i32,
    pub m: i32,
}

/// A tree: a node goes with its parent. A code is unique.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = nodes)]
#[entity(new = NewNode, connection = AnyConnection)]
pub struct Node {
    #[entity(generated)]
    pub id: i32,
    #[entity(references = Node)]
    pub parent: Option<i32>,
    pub code: Option<i32>,
    pub n: i32,
    pub m: i32,
}

/// A link cannot be deleted while another one refers to it; links can refer to each other.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = links)]
#[entity(new = NewLink, connection = AnyConnection)]
pub struct Link {
    pub id: i32,
    #[entity(references = Link)]
    pub parent: Option<i32>,
    pub n: i32,
    pub m: i32,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = counters)]
#[entity(new = NewCounter, connection = AnyConnection)]
pub struct Counter {
    pub id: i32,
    pub n: i32,
    pub m: i32,
    #[entity(version)]
    pub version: i32,
}

/// An entity's row as the model has it.
pub trait Modelled: Entity<Id = i32> {
    fn row(&self) -> Row;
    fn set(&mut self, column: Column, value: Option<i32>);
}

macro_rules! modelled {
    ($($entity:ident { $($parent:ident: $parent_is:ident)? ; $($code:ident)? ; $($version:ident)? })*) => {$(
        impl Modelled for $entity {
            fn row(&self) -> Row {
                Row {
                    $($parent: self.$parent.into(),)?
                    $($code: self.$code,)?
                    $($version: self.$version,)?
                    n: self.n,
                    m: self.m,
                    ..Row::default()
                }
            }

            fn set(&mut self, column: Column, value: Option<i32>) {
                match column {
                    $(Column::Parent => self.$parent = modelled!($parent_is value),)?
                    $(Column::Code => self.$code = value,)?
                    Column::N => self.n = value.expect("not nullable"),
                    Column::M => self.m = value.expect("not nullable"),
                    #[allow(unreachable_patterns)]
                    _ => panic!("no such column"),
                }
            }
        }
    )*};
    (needed $value:ident) => { $value.expect("not nullable") };
    (nullable $value:ident) => { $value };
}

modelled! {
    User { ; code ; }
    Post { parent: needed ; ; }
    Comment { parent: needed ; ; }
    Badge { parent: nullable ; ; }
    Node { parent: nullable ; code ; }
    Link { parent: nullable ; ; }
    Counter { ; ; version }
}

/// Keys that the database makes begin here.
const FIRST_KEY: i32 = 1000;

pub fn tables(kind: Kind) -> String {
    let columns = |key: &str, parent: &str| {
        format!(
            "(id {key}, parent INTEGER {parent}, code INTEGER UNIQUE, n INTEGER NOT NULL DEFAULT 0, \
             m INTEGER NOT NULL DEFAULT 0, version INTEGER NOT NULL DEFAULT 1"
        )
    };
    let references = |table: &str, action: &str| format!(", FOREIGN KEY (parent) REFERENCES {table} (id) {action})");
    let program = "INTEGER NOT NULL PRIMARY KEY";
    let (database, counts_from) = match kind {
        Kind::Sqlite => ("INTEGER PRIMARY KEY", String::new()),
        Kind::Postgres => ("SERIAL PRIMARY KEY", String::new()),
        Kind::Mariadb => ("INTEGER AUTO_INCREMENT PRIMARY KEY", format!(" AUTO_INCREMENT = {FIRST_KEY}")),
    };
    let sequences = match kind {
        Kind::Postgres => format!(
            "ALTER SEQUENCE posts_id_seq RESTART WITH {FIRST_KEY}; ALTER SEQUENCE nodes_id_seq RESTART WITH {FIRST_KEY};"
        ),
        Kind::Sqlite | Kind::Mariadb => String::new(),
    };
    format!(
        "DROP TABLE IF EXISTS posts; DROP TABLE IF EXISTS users;
         CREATE TABLE users {}); CREATE TABLE counters {});
         CREATE TABLE posts {}{}{counts_from}; CREATE TABLE comments {}{}; CREATE TABLE badges {}{};
         CREATE TABLE nodes {}{}{counts_from}; CREATE TABLE links {}{}; {sequences}",
        columns(program, ""),
        columns(program, ""),
        columns(database, "NOT NULL"),
        references("users", "ON DELETE CASCADE"),
        columns(program, "NOT NULL"),
        references("posts", "ON DELETE CASCADE"),
        columns(program, ""),
        references("users", "ON DELETE SET NULL"),
        columns(database, ""),
        references("nodes", "ON DELETE CASCADE"),
        columns(program, ""),
        references("links", ""),
    )
}

/// What every program begins with; [`rows::first_rows`](super::rows::first_rows) is the same for the model.
pub const FIRST_ROWS: &str = "BEGIN;
    DELETE FROM comments; DELETE FROM posts; DELETE FROM badges; DELETE FROM users; DELETE FROM counters;
    UPDATE links SET parent = NULL; DELETE FROM links;
    UPDATE nodes SET parent = NULL; DELETE FROM nodes;
    INSERT INTO users (id, code) VALUES (1, 1), (2, 2);
    INSERT INTO posts (id, parent) VALUES (1, 1);
    INSERT INTO comments (id, parent) VALUES (1, 1);
    INSERT INTO badges (id, parent) VALUES (1, 1);
    INSERT INTO nodes (id, parent, code) VALUES (1, NULL, 1), (2, 1, NULL), (3, 2, NULL);
    INSERT INTO links (id, parent) VALUES (1, NULL), (2, 1), (3, 2);
    UPDATE links SET parent = 3 WHERE id = 1;
    INSERT INTO counters (id) VALUES (1), (2);
    COMMIT";

/// Any row of any table.
#[derive(Debug, QueryableByName)]
pub struct Stored {
    #[diesel(sql_type = Text)]
    pub name: String,
    #[diesel(sql_type = Integer)]
    pub id: i32,
    #[diesel(sql_type = Nullable<Integer>)]
    pub parent: Option<i32>,
    #[diesel(sql_type = Nullable<Integer>)]
    pub code: Option<i32>,
    #[diesel(sql_type = Integer)]
    pub n: i32,
    #[diesel(sql_type = Integer)]
    pub m: i32,
    #[diesel(sql_type = Integer)]
    pub version: i32,
}

/// Reads all tables.
pub fn all_rows() -> String {
    let one = |table: &Table| {
        let name = table.name();
        format!("SELECT '{name}' AS name, id, parent, code, n, m, version FROM {name}")
    };
    Table::ALL.iter().map(one).collect::<Vec<_>>().join(" UNION ALL ")
}
