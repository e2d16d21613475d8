//! Entities of every shape, on every connection type, and their tables.

#![allow(clippy::duplicate_mod, dead_code, unreachable_pub)]

use diesel::prelude::*;
use diesel_session::unit_of_work::Fk;
use diesel_session::{Entity, NewEntity};

use crate::per_database::{AnyConnection, Kind};

diesel::table! {
    writers (id) {
        id -> Integer,
        name -> Text,
        email -> Nullable<Text>,
        version -> Integer,
    }
}

diesel::table! {
    articles (id) {
        id -> Integer,
        writer_id -> Integer,
        editor_id -> Nullable<Integer>,
        title -> Text,
        body -> Text,
    }
}

diesel::table! {
    labels (article_id, name) {
        article_id -> Integer,
        name -> Text,
        weight -> Integer,
    }
}

diesel::table! {
    follows (follower_id, followed_id) {
        follower_id -> Integer,
        followed_id -> Integer,
    }
}

diesel::table! {
    nodes (id) {
        id -> BigInt,
        parent_id -> Nullable<BigInt>,
        label -> Text,
    }
}

diesel::table! {
    countries (code) {
        code -> Text,
        name -> Text,
        people -> BigInt,
        area -> Double,
        landlocked -> Bool,
        flag -> Binary,
        founded -> Nullable<Timestamp>,
    }
}

diesel::joinable!(articles -> writers (writer_id));
diesel::allow_tables_to_appear_in_same_query!(articles, writers);

/// A counted key and a version.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Identifiable, Entity)]
#[diesel(table_name = writers)]
#[entity(new = NewWriter, connection = AnyConnection)]
pub struct Writer {
    #[entity(generated)]
    pub id: i32,
    pub name: String,
    pub email: Option<String>,
    #[entity(version)]
    pub version: i32,
}

/// Two foreign keys to one entity.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Identifiable, Associations, Entity)]
#[diesel(table_name = articles, belongs_to(Writer, foreign_key = writer_id))]
#[entity(new = NewArticle, connection = AnyConnection)]
pub struct Article {
    #[entity(generated)]
    pub id: i32,
    pub writer_id: i32,
    #[entity(references = Writer)]
    pub editor_id: Option<i32>,
    pub title: String,
    pub body: String,
}

/// A key of several columns that the program makes.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Identifiable, Associations, Entity)]
#[diesel(table_name = labels, primary_key(article_id, name), belongs_to(Article))]
#[entity(connection = AnyConnection)]
pub struct Label {
    pub article_id: i32,
    pub name: String,
    pub weight: i32,
}

#[derive(Debug, Clone, Insertable, NewEntity)]
#[diesel(table_name = labels)]
#[entity(Label, key(article_id, name), connection = AnyConnection)]
pub struct NewLabel {
    pub article_id: Fk<Article>,
    pub name: &'static str,
    pub weight: i32,
}

/// Nothing but a key.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Identifiable, Entity)]
#[diesel(table_name = follows, primary_key(follower_id, followed_id))]
#[entity(new = NewFollow, connection = AnyConnection)]
pub struct Follow {
    #[entity(references = Writer)]
    pub follower_id: i32,
    #[entity(references = Writer)]
    pub followed_id: i32,
}

/// Rows that refer to rows of their own kind.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Identifiable, Associations, Entity)]
#[diesel(table_name = nodes, belongs_to(Node, foreign_key = parent_id))]
#[entity(new = NewNode, connection = AnyConnection)]
pub struct Node {
    #[entity(generated)]
    pub id: i64,
    pub parent_id: Option<i64>,
    pub label: String,
}

/// A key that the program makes, and columns of many types.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Identifiable, Entity)]
#[diesel(table_name = countries, primary_key(code))]
#[entity(new = NewCountry, connection = AnyConnection)]
pub struct Country {
    pub code: String,
    pub name: String,
    pub people: i64,
    pub area: f64,
    pub landlocked: bool,
    pub flag: Vec<u8>,
    pub founded: Option<chrono::NaiveDateTime>,
}

/// Fewer columns than the table has.
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = countries, primary_key(code))]
#[entity(connection = AnyConnection)]
pub struct CountryName {
    pub code: String,
    pub name: String,
}

pub fn tables(kind: Kind) -> String {
    let (counted, big, text, moment, bytes, truth, real) = match kind {
        Kind::Sqlite => {
            ("INTEGER PRIMARY KEY", "INTEGER PRIMARY KEY", "TEXT", "TIMESTAMP", "BLOB", "BOOLEAN", "DOUBLE")
        }
        Kind::Postgres => {
            ("SERIAL PRIMARY KEY", "BIGSERIAL PRIMARY KEY", "TEXT", "TIMESTAMP", "BYTEA", "BOOLEAN", "DOUBLE PRECISION")
        }
        Kind::Mariadb => (
            "INTEGER AUTO_INCREMENT PRIMARY KEY",
            "BIGINT AUTO_INCREMENT PRIMARY KEY",
            "VARCHAR(100)",
            "DATETIME",
            "BLOB",
            "BOOLEAN",
            "DOUBLE",
        ),
    };
    format!(
        "CREATE TABLE writers (id {counted}, name {text} NOT NULL UNIQUE, email {text}, version INTEGER NOT NULL DEFAULT 1);
         CREATE TABLE articles (
             id {counted}, writer_id INTEGER NOT NULL, editor_id INTEGER, title {text} NOT NULL, body {text} NOT NULL,
             FOREIGN KEY (writer_id) REFERENCES writers (id), FOREIGN KEY (editor_id) REFERENCES writers (id));
         CREATE TABLE labels (
             article_id INTEGER NOT NULL, name {text} NOT NULL, weight INTEGER NOT NULL, PRIMARY KEY (article_id, name),
             FOREIGN KEY (article_id) REFERENCES articles (id) ON DELETE CASCADE);
         CREATE TABLE follows (
             follower_id INTEGER NOT NULL, followed_id INTEGER NOT NULL, PRIMARY KEY (follower_id, followed_id),
             FOREIGN KEY (follower_id) REFERENCES writers (id), FOREIGN KEY (followed_id) REFERENCES writers (id));
         CREATE TABLE nodes (id {big}, parent_id BIGINT, label {text} NOT NULL, FOREIGN KEY (parent_id) REFERENCES nodes (id));
         CREATE TABLE countries (
             code {text} PRIMARY KEY, name {text} NOT NULL, people BIGINT NOT NULL, area {real} NOT NULL,
             landlocked {truth} NOT NULL, flag {bytes} NOT NULL, founded {moment} NULL);"
    )
}

pub fn writer(name: &str) -> NewWriter {
    NewWriter { name: name.into(), email: None }
}

pub fn article(writer: impl Into<Fk<Writer>>, title: &str) -> NewArticle {
    NewArticle { writer_id: writer.into(), editor_id: None, title: title.into(), body: String::new() }
}

pub fn node(parent: Option<Fk<Node>>, label: &str) -> NewNode {
    NewNode { parent_id: parent, label: label.into() }
}
