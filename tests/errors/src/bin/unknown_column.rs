//~ cannot find type `nick` in module `users`
//~ pub nick: String,
use diesel::prelude::*;
use diesel_session::Entity;
use errors::schema::users;

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = users)]
pub struct User {
    pub id: i32,
    pub nick: String,
}

fn main() {}
