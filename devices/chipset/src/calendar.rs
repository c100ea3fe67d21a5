//! The Gregorian calendar, extended without end in both directions.

/// Seconds in a day.
pub(crate) const DAY: i64 = 86_400;

/// A moment to the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Civil {
    pub(crate) year: i64,
    /// 1 to 12.
    pub(crate) month: i64,
    /// 1 to 31.
    pub(crate) day: i64,
    pub(crate) hour: i64,
    pub(crate) minute: i64,
    pub(crate) second: i64,
}

impl Civil {
    /// The moment `seconds` after 1970-01-01T00:00:00.
    pub(crate) fn from_unix(seconds: i64) -> Civil {
        let time = seconds.rem_euclid(DAY);
        // Years begin in March here, so that the leap day is the last of its year; eras are of 400 years.
        let day = seconds.div_euclid(DAY) + 719_468;
        let (era, day) = (day.div_euclid(146_097), day.rem_euclid(146_097));
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        Civil {
            year: era * 400 + year + i64::from(month >= 10),
            month: if month < 10 { month + 3 } else { month - 9 },
            day: day - (153 * month + 2) / 5 + 1,
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    /// The inverse. Fields beyond their range carry over into the next, but for the month, which is limited
    /// to its range.
    pub(crate) fn to_unix(self) -> i64 {
        let month = self.month.clamp(1, 12);
        let year = self.year - i64::from(month <= 2);
        let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
        let month = (month + 9) % 12;
        let day_of_year = (153 * month + 2) / 5 + self.day - 1;
        let days = era * 146_097 + year * 365 + year / 4 - year / 100 + day_of_year - 719_468;
        days * DAY + self.hour * 3600 + self.minute * 60 + self.second
    }

    /// 1 for Sunday to 7 for Saturday.
    pub(crate) fn weekday(self) -> i64 {
        (self.to_unix().div_euclid(DAY) + 4).rem_euclid(7) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates_and_the_way_back() {
        for (seconds, date, weekday) in [
            (0, (1970, 1, 1, 0, 0, 0), 5),
            (951_782_399, (2000, 2, 28, 23, 59, 59), 2),
            (951_782_400, (2000, 2, 29, 0, 0, 0), 3),
            (1_709_251_199, (2024, 2, 29, 23, 59, 59), 5),
            (1_709_251_200, (2024, 3, 1, 0, 0, 0), 6),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0), 2),
            (-1, (1969, 12, 31, 23, 59, 59), 4),
            (-62_135_596_800, (1, 1, 1, 0, 0, 0), 2),
            (253_402_300_799, (9999, 12, 31, 23, 59, 59), 6),
        ] {
            let civil = Civil::from_unix(seconds);
            let Civil {
                year,
                month,
                day,
                hour,
                minute,
                second,
            } = civil;
            assert_eq!((year, month, day, hour, minute, second), date);
            assert_eq!(civil.to_unix(), seconds);
            assert_eq!(civil.weekday(), weekday, "{date:?}");
        }
        for days in -200_000..200_000 {
            assert_eq!(Civil::from_unix(days * DAY).to_unix(), days * DAY);
        }
    }
}
