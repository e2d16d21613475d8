//~ error: `embed` is not supported on an entity: each of its fields is a column
use diesel::prelude::*;
use diesel_session::Entity;
use errors::schema::users;

#[derive(Debug, Clone, Queryable, Selectable)]
#[diesel(table_name = users)]
pub struct Name {
    pub name: String,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = users)]
pub struct User {
    pub id: i32,
    #[diesel(embed)]
    pub name: Name,
}

fn main() {}
